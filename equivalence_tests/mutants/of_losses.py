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


def _summed_over_classes(logits, targets, threshold=None):
    return _BCE(logits, targets, threshold) * logits.shape[1]


def _smoothed_after_the_threshold(logits, targets, threshold=None):
    return _BCE(logits, targets, None)


_BCE = losses.binary_cross_entropy
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
        name="weighted loss over the images",
        difference="22b",
        what="the loss with class weights is divided by the images instead of by their weights",
        patches=[(steps, "_class_factors", lambda weights, *_: weights)],
    ),
    Mutant(
        name="binary losses summed",
        difference="35e",
        what="binary cross-entropy is summed over the classes instead of averaged",
        patches=[(losses, "binary_cross_entropy", _summed_over_classes)],
    ),
    Mutant(
        name="no threshold of targets",
        difference="35f",
        what="binary cross-entropy takes soft targets where they should become 0 or 1",
        patches=[(losses, "binary_cross_entropy", _smoothed_after_the_threshold)],
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
