"""Roofline model: time of a step on a device that always runs at its ceilings.

Each convolution and linear layer takes the longer of its arithmetic and its memory traffic, at the
ceilings that the device reached in the same run; a step is the sum. This is an estimate, not a
bound. It counts a gradient of the images, which the first layer does not compute, and a program
that keeps more on the chip than `OUTPUT_PASSES` assumes may be faster.
"""

import contextlib
import math
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resnet.models import create_model

OUTPUT_PASSES = {"train": 11, "inference": 1}
"""Memory transfers of a convolution's output if only one elementwise pass is kept on the chip.
Inference: one write. Training, forward: one write; BatchNorm reads it for the statistics, then
reads and writes it to normalise. Backward: BatchNorm's two sums read activation and gradient, its
gradient reads both and writes one; both gradients of the convolution read the incoming one."""

INPUT_PASSES = {"train": 3, "inference": 1}
"""Memory transfers of a convolution's input: read forward and for the weight's gradient; its own
gradient written."""

WEIGHT_PASSES = {"train": 8, "inference": 1}
"""Memory transfers of a weight: read twice; its gradient written and read; momentum and weight read
and written by the optimizer."""


class Layer(NamedTuple):
    """Numbers of values in a convolution or linear layer, for one image."""

    multiplications: int
    inputs: int
    outputs: int
    weights: int


def layers(arch: str, *, stem, num_classes: int, image_size: int) -> list[Layer]:
    """The convolutions and linear layers of a network in order, found without computing."""
    found = []

    def recording(original):
        def call(module, x):
            output = original(module, x)
            kernel = module.kernel[...].shape
            outputs = math.prod(output.shape[1:])
            each = math.prod(kernel[:-1])
            inputs = math.prod(x.shape[1:])
            found.append(Layer(outputs * each, inputs, outputs, math.prod(kernel)))
            return output

        return call

    with contextlib.ExitStack() as stack:
        for kind in (nnx.Conv, nnx.Linear):
            stack.enter_context(mock.patch.object(kind, "__call__", recording(kind.__call__)))
        image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
        nnx.eval_shape(lambda x: _evaluated(arch, num_classes, stem)(x), image)
    return found


def _evaluated(arch, num_classes, stem):
    model = create_model(arch, num_classes, stem=stem)
    model.eval()
    return model


def step_flops(network: list[Layer], mode: str, batch_size: int) -> int:
    """FLOPs of a step: 2 per multiply-add; training is three times a forward pass."""
    passes = 3 if mode == "train" else 1
    return 2 * passes * batch_size * sum(layer.multiplications for layer in network)


def step_bytes(layer: Layer, mode: str, batch_size: int, itemsize: int) -> int:
    """Bytes that one layer transfers; in training weights are at least float32."""
    values = OUTPUT_PASSES[mode] * layer.outputs + INPUT_PASSES[mode] * layer.inputs
    wide = max(4, itemsize) if mode == "train" else itemsize
    return batch_size * values * itemsize + WEIGHT_PASSES[mode] * layer.weights * wide


def floor_seconds(network, mode, batch_size, itemsize, ceilings: dict) -> float:
    """Seconds of a step at `ceilings`: {"flops": per second, "bytes": per second}."""
    return sum(
        max(
            step_flops([layer], mode, batch_size) / ceilings["flops"],
            step_bytes(layer, mode, batch_size, itemsize) / ceilings["bytes"],
        )
        for layer in network
    )
