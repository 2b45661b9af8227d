"""Losses equal torch's, metrics equal scikit-learn's, early stopping equals the twin's.

The twin is `torch_ref`, this project's PyTorch side.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
import torch

import torch_ref.losses
import torch_ref.selection
from equivalence_tests.parity import inputs, tolerances
from flax_resnet import metrics
from flax_resnet.config import EarlyStoppingConfig, OptimizerConfig, TrainConfig
from flax_resnet.training import losses, selection, steps
from flax_resnet.training.network import Preprocess, Variables

pytestmark = pytest.mark.quick

NUM_CLASSES = 9


def random_logits(size=1.0, seed=0):
    rng = inputs.random_numbers(seed)
    return size * rng.standard_normal((11, NUM_CLASSES)), rng.integers(0, NUM_CLASSES, 11)


def loss_and_gradient_of_torch(logits, targets, smoothing=0.0):
    logits = torch.tensor(logits, requires_grad=True)
    loss = torch_ref.losses.cross_entropy(logits, torch.tensor(targets), label_smoothing=smoothing)
    loss.backward()
    return loss.item(), logits.grad.numpy()


def loss_and_gradient_of_jax(logits, targets):
    def loss(logits):
        return losses.cross_entropy(logits, targets).mean()

    return jax.value_and_grad(loss)(jnp.asarray(logits))


def close(got, expected):
    return all(
        np.linalg.norm(g - e) <= tolerances.RULES * np.linalg.norm(e)
        for g, e in zip(got, expected, strict=True)
    )


# Logits of 1000 overflow every softmax that does not subtract the largest.
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_and_label_smoothing(size, smoothing, x64):
    logits, labels = random_logits(size)
    targets = losses.soft_targets(labels, NUM_CLASSES, smoothing, jnp.float64)
    got = loss_and_gradient_of_jax(logits, targets)
    assert close(got, loss_and_gradient_of_torch(logits, labels, smoothing))


def test_soft_targets_of_mixup(x64):
    logits, labels = random_logits()
    targets = losses.soft_targets(labels, NUM_CLASSES, 0.1, jnp.float64)
    mixed = np.asarray(0.3 * targets + 0.7 * targets[::-1])
    got = loss_and_gradient_of_jax(logits, mixed)
    assert close(got, loss_and_gradient_of_torch(logits, mixed))
    # Torch smooths after mixing, we smooth before; the targets are equal.
    hard = losses.soft_targets(labels, NUM_CLASSES, 0.0, jnp.float64)
    expected = loss_and_gradient_of_torch(logits, np.asarray(0.3 * hard + 0.7 * hard[::-1]), 0.1)
    assert close(got, expected)


@pytest.mark.control
def test_smoothing_over_the_other_classes_only_is_seen(x64):
    logits, labels = random_logits()
    wrong = losses.soft_targets(labels, NUM_CLASSES, 0.1 * NUM_CLASSES / (NUM_CLASSES - 1))
    got = loss_and_gradient_of_jax(logits, wrong)
    assert not close(got, loss_and_gradient_of_torch(logits, labels, 0.1))


class GivenLogits:
    """A network whose logits are its parameters."""

    def apply(self, variables, images, *, train, dropout_keys):
        return variables.params["logits"], {}


def loss_and_gradient_of_a_step(logits, labels, weights=None, mixup=0.0, **options):
    """Loss, gradient of the logits and targets [B, K] of a training step."""
    optimizer = OptimizerConfig(**options)
    config = TrainConfig(optimizer=optimizer, augment=dict(mixup=mixup, random_crop=0))
    state = steps.make_state(Variables({"logits": jnp.asarray(logits)}, {}, {}), config)
    batch = {"image": jnp.zeros((len(labels), 2, 2, 1), jnp.uint8), "label": jnp.asarray(labels)}
    batch["index"] = jnp.arange(len(labels))
    prepared = steps.prepare_batch(
        state,
        batch,
        config,
        Preprocess((0.5,), (0.5,)),
        num_classes=NUM_CLASSES,
        class_weights=weights,
    )
    gradients, forward = steps.loss_and_gradients(GivenLogits(), state, prepared, config)
    return (forward.loss, gradients["logits"]), np.array(prepared.targets)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs(smoothing, mixup, x64):
    logits, labels = random_logits()
    weights = inputs.random_numbers(5).uniform(0.1, 4, NUM_CLASSES)
    got, targets = loss_and_gradient_of_a_step(
        logits, labels, weights, mixup, label_smoothing=smoothing
    )
    theirs = torch.tensor(logits, requires_grad=True)
    mixed = {"target": torch.tensor(targets)}  # smoothed already
    plain = {"target": torch.tensor(labels), "label_smoothing": smoothing}
    loss = torch.nn.functional.cross_entropy(
        theirs, weight=torch.tensor(weights), **(mixed if mixup else plain)
    )
    loss.backward()
    assert close(got, [loss.item(), theirs.grad.numpy()])


@pytest.mark.parametrize("mixup", [0.0, 0.4])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_timms(smoothing, threshold, mixup, x64):
    timm = pytest.importorskip("timm.loss")
    logits, labels = random_logits(3.0)
    options = dict(loss="bce", bce_threshold=threshold, label_smoothing=smoothing)
    got, targets = loss_and_gradient_of_a_step(logits, labels, mixup=mixup, **options)
    theirs = torch.tensor(logits, requires_grad=True)
    reference = timm.BinaryCrossEntropy(smoothing, target_threshold=threshold)
    loss = reference(theirs, torch.tensor(targets if mixup else labels))
    loss.backward()
    assert close(got, [loss.item(), theirs.grad.numpy()])
    if not mixup:
        own = torch_ref.losses.training_loss(
            torch.tensor(logits), torch.tensor(labels), OptimizerConfig(**options)
        )
        assert own.item() == pytest.approx(loss.item(), rel=1e-12)


def test_the_l1_penalty(x64):
    rng = inputs.random_numbers()
    params = {"a": rng.standard_normal((3, 4)), "b": {"c": rng.standard_normal(5)}}
    params["a"][0, 0] = 0  # both use a gradient of 0 for |w| at 0
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in jax.tree.leaves(params)]
    expected = torch_ref.losses.l1_penalty(tensors, 0.3)
    expected.backward()
    got = jax.value_and_grad(lambda p: 0.3 * losses.l1_penalty(p))(params)
    assert close(jax.tree.leaves(got), [expected.item(), *(t.grad.numpy() for t in tensors)])


# Metrics: the reference gets labels and predictions, ours only the confusion matrix.


def random_labels(kind: str, seed: int):
    """(labels, predictions) with unusual classes as `kind` says."""
    rng = inputs.random_numbers(seed)
    labels = rng.choice(NUM_CLASSES, 200, p=rng.dirichlet(np.ones(NUM_CLASSES)))
    predicted = np.where(rng.random(200) < 0.6, labels, rng.integers(0, NUM_CLASSES, 200))
    if kind == "absent":
        labels[labels < 3] = 5  # 0 to 2 are predicted only
    if kind == "never predicted":
        predicted[predicted < 3] = 5
    if kind == "neither":
        labels[labels < 3], predicted[predicted < 3] = 5, 5
    if kind == "one class":
        labels[:], predicted[:] = 4, 4
    if kind == "all wrong":
        predicted = (labels + 1) % NUM_CLASSES
    return labels, predicted


def counts(labels, predicted):
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int32)
    np.add.at(confusion, (labels, predicted), 1)
    return confusion


KINDS = ["any", "absent", "never predicted", "neither", "one class", "all wrong"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_scikit_learns(kind, seed):
    labels, predicted = random_labels(kind, seed)
    summary = metrics.summarize(counts(labels, predicted))
    expected = {"accuracy": sklearn.metrics.accuracy_score(labels, predicted)}
    for average in ("macro", "micro", "weighted"):
        scores = sklearn.metrics.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        names = (f"precision_{average}", f"recall_{average}", f"f1_{average}")
        expected |= dict(zip(names, scores[:3], strict=True))
    assert summary == pytest.approx(expected, abs=1e-14)
    each = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(NUM_CLASSES), zero_division=0
    )
    for got, want in zip(metrics.per_class(counts(labels, predicted)).values(), each, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-14)


def test_rows_are_the_true_classes():
    labels, predicted = random_labels("absent", 0)
    swapped = metrics.summarize(counts(predicted, labels))
    summary = metrics.summarize(counts(labels, predicted))
    assert swapped["precision_macro"] == summary["recall_macro"] != summary["precision_macro"]


def test_no_images_give_zeros():
    summary = metrics.summarize(np.zeros((3, 3), int))
    assert set(summary.values()) == {0.0}


class Logits:
    """A network whose images are its logits."""

    def apply(self, variables, images, *, train):
        assert not train
        return images[:, 0, 0], None


def evaluated(logits, labels, split) -> dict:
    """Sums of `eval_step` over batches of the sizes in `split`, padded to the largest."""
    step = steps.make_eval_step(Logits(), inputs.AsGiven(), num_classes=NUM_CLASSES)
    variables = Variables({"w": jnp.zeros((), jnp.float64)}, {}, {})
    total, start = None, 0
    for size in split:
        rows = slice(start, start + size)
        pad = max(split) - size
        # Padding must not matter; NaN would show if it did.
        padded = jnp.pad(logits[rows], ((0, pad), (0, 0)), constant_values=jnp.nan)
        batch = {
            "image": padded[:, None, None],
            "label": jnp.pad(jnp.asarray(labels[rows]), (0, pad), constant_values=3),
            "mask": jnp.arange(max(split)) < size,
        }
        sums = step(variables, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        start += size
    return jax.tree.map(np.asarray, total)


@pytest.mark.parametrize("split", [(53,), (20, 20, 13), (1,) * 53, (52, 1), (30, 23)])
def test_any_split_into_batches_gives_the_sums_of_the_whole(split, x64):
    rng = inputs.random_numbers()
    logits, labels = rng.standard_normal((53, NUM_CLASSES)), rng.integers(0, NUM_CLASSES, 53)
    sums = evaluated(logits, labels, split)
    assert sums["count"] == 53
    loss = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), reduction="sum"
    )
    assert sums["loss"] == pytest.approx(loss.item(), rel=tolerances.RULES)
    top5 = sklearn.metrics.top_k_accuracy_score(
        labels, logits, k=5, normalize=False, labels=range(NUM_CLASSES)
    )
    assert sums["top5"] == top5
    np.testing.assert_array_equal(
        sums["confusion"], sklearn.metrics.confusion_matrix(labels, logits.argmax(1))
    )


def test_of_equal_logits_the_first_counts(x64):
    """The reference is torch's argmax and NumPy's stable sort; torch's topk leaves ties open."""
    rng = inputs.random_numbers()
    logits = rng.integers(0, 3, (200, NUM_CLASSES)).astype(np.float64)
    labels = rng.integers(0, 3, 200)  # the classes that the order of ties puts first
    sums = evaluated(logits, labels, (200,))
    expected = counts(labels, torch.tensor(logits).argmax(1).numpy())
    np.testing.assert_array_equal(sums["confusion"], expected)
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert sums["top5"] == (ranked == labels[:, None]).any(1).sum()


@pytest.mark.control
def test_a_mean_of_means_would_be_seen(x64):
    rng = inputs.random_numbers()
    logits, labels = rng.standard_normal((53, NUM_CLASSES)), rng.integers(0, NUM_CLASSES, 53)
    whole = evaluated(logits, labels, (53,))
    parts = [evaluated(logits[a:b], labels[a:b], (b - a,)) for a, b in ((0, 50), (50, 53))]
    means = np.mean([part["loss"] / part["count"] for part in parts])
    assert means != pytest.approx(whole["loss"] / 53, rel=1e-3)


@pytest.mark.parametrize("k", [2, 4, 5, 6])
def test_top_5_with_few_classes_is_torchs(k, x64):
    """With five classes or fewer, every label is in the top five."""
    logits, labels = random_logits()
    logits, labels = logits[:, :k], labels % k
    step = steps.make_eval_step(Logits(), inputs.AsGiven(), num_classes=k)
    batch = {"image": jnp.asarray(logits)[:, None, None], "label": jnp.asarray(labels)}
    batch["mask"] = jnp.ones(len(labels), bool)
    sums = step(Variables({"w": jnp.zeros((), jnp.float64)}, {}, {}), batch)
    ranked = torch.tensor(logits).topk(min(5, k)).indices.numpy()
    assert sums["top5"] == (ranked == labels[:, None]).sum()


# Early stopping.

NAN, INF = math.nan, math.inf
COURSES = [
    [1.0, 0.9, 0.8, 0.85, 0.9, 0.79, 0.95, 0.95, 0.95, 0.95],
    [0.1, 0.2, 0.3, 0.25, 0.3, 0.31, 0.31, 0.31, 0.31, 0.31],
    [NAN, NAN, 0.5, NAN, 0.4, INF, -INF, NAN, NAN, NAN],
    [1.0] * 8,
    [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7],
    list(inputs.random_numbers(1).standard_normal(40)),
]


def stops(config, values, side=selection):
    """The state of every epoch: stop or not, epochs without improvement, best value, its epoch."""
    state, seen = side.Selection(), []
    for epoch, value in enumerate(values, start=1):
        state = side.update(state, value, epoch, config)
        stop = state.should_stop(config.patience)
        seen.append((stop, state.bad_epochs, state.best, state.best_epoch or None))
    return seen


@pytest.mark.parametrize("monitor", ["validation_loss", "validation_accuracy"])
@pytest.mark.parametrize("patience", [0, 1, 2, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.07])
def test_early_stopping_is_the_twins(monitor, patience, min_delta):
    config = EarlyStoppingConfig(monitor=monitor, patience=patience, min_delta=min_delta)
    for values in COURSES:
        assert stops(config, values) == stops(config, values, torch_ref.selection)


@pytest.mark.parametrize(
    "monitor, patience, min_delta, values, stop, best",
    [
        ("validation_loss", 2, 0.0, [1.0, 0.5, 0.6, 0.5], 4, 2),  # as good is not better
        ("validation_loss", 1, 0.1, [1.0, 0.95, 0.5], 2, 2),
        (
            "validation_loss",
            2,
            0.1,
            [1.0, 0.95, 0.89, 0.9],
            None,
            3,
        ),  # min_delta refers to the best value
        ("validation_accuracy", 2, 0.0, [0.1, 0.3, 0.2, 0.3, 0.4], 4, 2),
        ("validation_accuracy", 0, 0.0, [0.9] + [0.1] * 50, None, 1),
        ("validation_accuracy", 1, 0.0, [NAN, 0.2], 1, None),
        ("validation_f1_macro", 3, 0.0, [0.2, NAN, INF, 0.3], None, 4),
    ],
)
def test_early_stopping_by_hand(monitor, patience, min_delta, values, stop, best):
    config = EarlyStoppingConfig(monitor=monitor, patience=patience, min_delta=min_delta)
    seen = stops(config, values)
    flags = [row[0] for row in seen]
    assert (flags.index(True) + 1 if True in flags else None) == stop
    assert seen[(stop or len(values)) - 1][3] == best
