"""Folding BatchNorm into the convolutions keeps the logits, in float64 and in float32."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivalence_tests.parity import engine, inputs, tolerances
from flax_resnet.models import create_model, folding
from flax_resnet.training.network import Network
from flax_resnet.weights import convert

SMALL = ["resnet20", "basic_cnn"]  # without projections; without BatchNorm
LARGE = [
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("resnext50_32x4d", marks=pytest.mark.slow),
]


def logits(case, dtype, *, folded: bool) -> np.ndarray:
    model = create_model(case.arch, case.num_classes, param_dtype=dtype)
    convert.load_state_dict(model, case.arrays).eval()
    network = Network(folding.fold_batchnorm(model) if folded else model)
    assert bool(network.initial.batch_stats) == (not folded and case.arch != "basic_cnn")
    images = jnp.asarray(case.images[0], dtype)
    forward = jax.jit(lambda variables, x: network.apply(variables, x, train=False)[0])
    return np.asarray(forward(network.initial, images), np.float64)


@pytest.mark.parametrize("arch", [*SMALL, "resnet18", *LARGE])
def test_in_float64_the_logits_stay(x64, arch):
    case = inputs.make_case(arch)
    assert tolerances.relative_error(
        *(logits(case, np.float64, folded=f) for f in (True, False))
    ) < (tolerances.float64(arch, "forward"))


@pytest.mark.parametrize("arch", [*SMALL, *LARGE])
def test_in_float32_the_error_is_within_the_budget(arch):
    case = inputs.make_case(arch, batch=4)
    truth = engine.run_torch(case, train=False)["forward"]["fc"]
    reference = engine.run_torch(case, np.float32, train=False)["forward"]["fc"]
    bound = tolerances.BUDGET_FACTOR * tolerances.relative_error(reference, truth)
    bound += tolerances.BUDGET_ULPS * np.finfo(np.float32).eps
    assert tolerances.relative_error(logits(case, np.float32, folded=True), truth) <= bound


def test_the_model_itself_stays_as_it_is():
    model = create_model("resnet20")
    before = convert.state_dict(model)
    folding.fold_batchnorm(model)
    after = convert.state_dict(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not model.bn1.use_running_average


def without_eps(convolution, norm, original=folding._fold):
    norm.epsilon = 0
    original(convolution, norm)


@pytest.mark.control
def test_eps_left_out_shows(x64):
    case = inputs.make_case("resnet20")
    with mock.patch.object(folding, "_fold", without_eps):
        wrong = logits(case, np.float64, folded=True)
    assert tolerances.relative_error(wrong, logits(case, np.float64, folded=False)) > (
        1000 * tolerances.float64("resnet20", "forward")
    )
