"""Faults of losses and metrics."""

import jax.numpy as jnp
import optax

from equivalence_tests.mutants.mutant import Mutant
from flax_resnet.training import losses, steps


def _over_the_others(labels, num_classes, smoothing, dtype=jnp.float32):
    return _SOFT_TARGETS(labels, num_classes, smoothing * num_classes / (num_classes - 1), dtype)


def _narrow_loss(logits, targets):
    return optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))


def _mean_of_means(network, preprocess, *, num_classes):
    eval_step = _EVAL_STEP(network, preprocess, num_classes=num_classes)

    def step(variables, batch):
        sums = eval_step(variables, batch)
        return sums | {"loss": sums["loss"] / sums["count"] * batch["mask"].size}

    return step


def _last_of_equals(logits, labels):
    return _LABEL_RANK(logits[:, ::-1], logits.shape[1] - 1 - labels)


_SOFT_TARGETS, _EVAL_STEP, _LABEL_RANK = losses.soft_targets, steps.make_eval_step, steps.label_rank

MUTANTS = [
    Mutant(
        name="smoothing over the other classes",
        difference="22a",
        what="label smoothing spreads e over the K - 1 other classes",
        phase="loss",
        patches=[(losses, "soft_targets", _over_the_others)],
    ),
    Mutant(
        name="loss in bfloat16",
        difference="29b",
        what="cross-entropy is computed in bfloat16 in mixed precision",
        patches=[(losses, "cross_entropy", _narrow_loss)],
    ),
    Mutant(
        name="mean of means",
        difference="33a",
        what="the last, smaller batch counts as much as the others",
        patches=[(steps, "make_eval_step", _mean_of_means)],
    ),
    Mutant(
        name="last of equals",
        difference="33b",
        what="among equal logits, top five prefers the last instead of the first",
        patches=[(steps, "label_rank", _last_of_equals)],
    ),
]
