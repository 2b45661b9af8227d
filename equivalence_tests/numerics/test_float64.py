"""All 16 networks in float64, where rounding cannot hide a difference: training and evaluation.

Compared are every activation, the loss, the gradients of all parameters and of the images,
BatchNorm's state, the optimizer's state and the parameters after a step (`tolerances.float64`).
The default suite runs one network of every kind.
"""

import functools
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import flax_resnet
from equivalence_tests.parity import engine, tolerances
from equivalence_tests.parity.inputs import make_case
from flax_resnet.config import WITH_STEMS
from flax_resnet.models import layers, resnet
from flax_resnet.training import losses

QUICK = ("resnet20", "resnet18")
# One network of every kind, and both stems; the others differ only in depth, width or groups.
DEFAULT = [
    ("resnext50_32x4d", "cifar"),
    ("resnet110", None),
    ("basic_cnn", None),
]


def marks(arch, stem):
    if arch in QUICK:
        return [pytest.mark.quick]
    return [] if (arch, stem) in DEFAULT else [pytest.mark.slow]


MANY_STEPS = 5
"""The number of steps above which compiling the step costs less than it saves."""

CASES = [
    pytest.param(arch, stem, marks=marks(arch, stem))
    for arch in flax_resnet.list_models()
    for stem in (("imagenet", "cifar") if arch in WITH_STEMS else (None,))
]


def too_large(case, *, train=True, bound=None) -> list[engine.Row]:
    """Rows over their bound."""
    got = engine.run_jax(case, train=train, jit=len(case.images) > MANY_STEPS)
    reference = engine.run_torch(case, train=train)
    assert {a.dtype for phase in got.values() for a in phase.values() if a.ndim} == {np.dtype("f8")}
    rows = engine.compare(got, reference)
    limit = {p: bound or tolerances.float64(case.arch, p) for p in engine.PHASES}
    return [row for row in rows if row.norm_relative > limit[row.phase]]


@pytest.mark.parametrize("arch, stem", CASES)
def test_one_step_of_training(arch, stem):
    assert too_large(make_case(arch, stem=stem)) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "arch", ["resnet20", "basic_cnn", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_the_librarys_kernels(arch):
    case = make_case(arch, kernels="library")
    assert too_large(case) == [] and too_large(case, train=False) == []


@pytest.mark.parametrize("arch, stem", CASES)
def test_evaluation(arch, stem):
    assert too_large(make_case(arch, stem=stem), train=False) == []


@pytest.mark.quick
def test_projection_shortcuts_of_the_cifar_nets():
    case = make_case("resnet20", shortcut="projection")
    assert "layer2.0.downsample.1.running_var" in case.arrays
    assert too_large(case) == [] and too_large(case, train=False) == []


@pytest.mark.quick
@pytest.mark.parametrize("kernels", ["auto", pytest.param("library", marks=pytest.mark.slow)])
def test_statistics_of_groups_of_images(kernels):
    case = make_case("resnet20", batch=6, batch_norm_images=3, kernels=kernels)
    assert too_large(case) == [] and too_large(case, train=False) == []


def without_norm(self, x):
    convolution, norm = self.layers
    out = convolution(x)
    norm(out)  # recorded, but its result is not used
    return out


def one_pixel_off(self, x):
    return PROJECTION(self, jnp.roll(x, 1, axis=2))


PROJECTION = resnet.Projection.__call__


@pytest.mark.control
@pytest.mark.quick
@pytest.mark.parametrize("fault, where", [(without_norm, ""), (one_pixel_off, ".0")])
def test_a_fault_of_a_projection_shows_there(fault, where):
    with mock.patch.object(resnet.Projection, "__call__", fault):
        row = too_large(make_case("resnet20", shortcut="projection"), train=False)[0]
    assert (row.phase, row.name) == ("forward", f"layer2.0.downsample{where}")


@pytest.mark.parametrize(
    "arch",
    ["resnet20", *(pytest.param(a, marks=pytest.mark.slow) for a in ("resnet18", "resnet50"))],
)
def test_twenty_steps(arch):
    # With two images instead of eight, BatchNorm amplifies rounding by 1e4 in 20 steps.
    stem = "cifar" if arch in WITH_STEMS else None
    case = make_case(arch, stem=stem, size=(8, 9), batch=8, steps=20, lr=1e-3)
    assert too_large(case, bound=tolerances.TRAJECTORY) == []


@pytest.mark.quick
@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
def test_ties_of_relu_at_zero(arch):
    """Residual branches that end in 0 give the last ReLU of a block inputs of exactly 0."""
    assert too_large(make_case(arch, zero_init=True, seed=1)) == []


@pytest.mark.quick
@pytest.mark.parametrize("arch", ["resnet20", "basic_cnn"])
def test_dropout_with_the_same_mask(arch):
    case = make_case(arch, dropout=0.4, steps=2)
    assert too_large(case) == []
    assert too_large(case, train=False) == []
    masked = engine.run_jax(case)
    case.masks[1] ^= True
    rows = engine.compare(masked, engine.run_torch(case))
    assert engine.worst(rows, "loss").norm_relative > 1e-3


@pytest.mark.parametrize(
    "size", [(13, 16), *(pytest.param(s, marks=pytest.mark.slow) for s in ((12, 17), (11, 10)))]
)
def test_even_and_odd_sizes(size):
    assert too_large(make_case("resnet20", size=size)) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "rule",
    [
        dict(lr=1e-3, ema_decay=0.9),  # does not average the running statistics
        dict(lr=1e-3, clip_norm=0.1),
        dict(optimizer="adamw", lr=1e-3, weight_decay=0.1, label_smoothing=0.2),
        dict(optimizer="rmsprop", lr=1e-4, centered=True, decay_norm_and_bias=False),
        dict(lr=1e-3, nesterov=False, l1=1e-4, weight_decay=0.1, decoupled_weight_decay=True),
    ],
    ids=["moving average", "clipping", "adamw", "rmsprop", "l1"],
)
def test_other_rules_on_a_network(rule):
    assert too_large(make_case("resnet20", steps=2, **rule)) == []


def momentum_of_flax(old, new, momentum):
    return MOVING(old, new, 0.01)


def biased_variance(self, mean, var, count):
    BATCH_NORM_UPDATE(self, mean, var * ((count - 1) / count), count)


def larger_epsilon(x):
    return 1 / jnp.sqrt(x + 1e-5)


def smoothed_over_the_others(labels, num_classes, smoothing, dtype):
    return SOFT_TARGETS(labels, num_classes, smoothing * num_classes / (num_classes - 1), dtype)


def same_padding(x, window, stride, **_):
    return nnx.max_pool(x, (window, window), (stride, stride), "SAME")


def no_nesterov(decay, nesterov):
    return TRACE(decay)


MOVING = layers._moving
BATCH_NORM_UPDATE = layers.BatchNorm._update
SOFT_TARGETS = losses.soft_targets
TRACE = optax.trace

FAULTS = [  # the fault, the module and name that it replaces, the first phase that shows it
    (biased_variance, layers.BatchNorm, "_update", "batch_norm"),
    (momentum_of_flax, layers, "_moving", "batch_norm"),
    (larger_epsilon, lax, "rsqrt", "forward"),
    (smoothed_over_the_others, losses, "soft_targets", "loss"),
    (same_padding, layers, "max_pool", "forward"),
    (no_nesterov, optax, "trace", "parameters"),
]


@pytest.mark.control
@pytest.mark.quick
@pytest.mark.parametrize("fault, module, name, phase", FAULTS)
def test_a_fault_shows_first_in_its_phase(fault, module, name, phase):
    case = make_case("resnet18" if name == "max_pool" else "resnet20")
    with mock.patch.object(module, name, fault):
        assert too_large(case)[0].phase == phase


@pytest.mark.control
@pytest.mark.quick
def test_half_a_gradient_at_zero_shows_only_in_ties():
    half = functools.partial(jnp.maximum, 0)
    with mock.patch.multiple(layers, relu=half, relu_of_sum=half):
        assert too_large(make_case("resnet20")) == []
        assert {row.phase for row in too_large(make_case("resnet20", zero_init=True))} >= {
            "gradient",
            "parameters",
        }


@pytest.mark.control
def test_narrow_numbers_are_not_float64():
    """A float64 test that ran in float32 would exceed every bound."""
    case = make_case("resnet20")
    rows = engine.compare(engine.run_jax(case, np.float32, jit=True), engine.run_torch(case))
    assert engine.worst(rows, "forward").norm_relative > 1e3 * tolerances.FORWARD
