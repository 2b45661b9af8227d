"""Ports that keep a state of training which PyTorch does not have."""

import jax
import jax.numpy as jnp
import pytest
from torch import nn

from equivalence_tests.parity import compare_models


def in_equinox(mode):
    """A convolution, Equinox's BatchNorm and a dense layer."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        dense: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0))
            self.conv = eqx.nn.Conv2d(3, 6, 3, 1, 1, use_bias=False, key=keys[0])
            self.norm = eqx.nn.BatchNorm(6, "batch", mode=mode)
            self.dense = eqx.nn.Linear(6, 4, key=keys[1])

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.dense(jax.nn.relu(x).mean((1, 2))), state

    return eqx.nn.make_with_state(Net)()


def in_torch():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


COMMON = {
    "BatchNorm's momentum is 0.01 instead of 0.1 (a decay of 0.99)",
    "the running variance takes the biased variance of the batch (n instead of n - 1)",
}


@pytest.mark.control
@pytest.mark.parametrize(
    "mode,own",
    [
        ("ema", "BatchNorm normalises by averages of which the batch is 0.01"),
        ("batch", "evaluation depends on a state of training that PyTorch does not have"),
    ],
)
def test_all_causes_of_equinox_batch_norm_are_named(mode, own):
    report = compare_models(in_equinox(mode), in_torch())
    assert report.explained, str(report)
    assert set(report.groups()) == COMMON | {own}


def counting(read: bool):
    """A linear network that counts its training steps, and in evaluation may divide by them."""

    def apply(variables, images, train):
        logits = images.mean((1, 2)) @ variables["w"] + variables["b"][None]
        count = variables["count"]
        scale = count.astype(logits.dtype) if read and not train else 1.0
        return logits / scale, variables | {"count": count + 1 if train else count}

    return apply, {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4), "count": jnp.array(1, jnp.int32)}


def flat():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))


def test_a_count_that_nothing_reads_is_no_difference():
    assert compare_models(counting(read=False), flat(), image_size=(8, 8)).verdict == "equal"


@pytest.mark.control
def test_an_evaluation_that_depends_on_the_steps_taken_is_found():
    report = compare_models(counting(read=True), flat(), image_size=(8, 8))
    assert report.verdict == "divergent"
    assert [fault.module for fault in report.faults] == ["['count']"]
