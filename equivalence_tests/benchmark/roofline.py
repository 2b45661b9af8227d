"""The time that a network takes on a device that always runs at its ceilings, from its own FLOPs
and bytes.

A step is the sum over convolutions and linear layers of whichever takes longer, the arithmetic or
the memory, at the ceilings that the device reached in the same run. That is a measure, not a bound:
it counts a gradient of the images, which the first layer does not compute, and a program that keeps
more on the chip than `OUTPUT_PASSES` says may take less.
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
"""Times that the output of a convolution crosses the memory if nothing is kept on the chip but one
elementwise pass. Inference: written. Training: written; BatchNorm reads it for its statistics and
reads and writes it to normalise; backwards its two sums read activation and gradient, its
gradient reads both and writes one; both gradients of the convolution read what came in."""

INPUT_PASSES = {"train": 3, "inference": 1}
"""The same of its input: read forwards and for the weight's gradient; its own gradient written."""

WEIGHT_PASSES = {"train": 8, "inference": 1}
"""Read twice, gradient written and read, momentum and weight read and written."""


class Layer(NamedTuple):
    """A convolution or linear layer; values of one image."""

    multiplications: int
    inputs: int
    outputs: int
    weights: int


def layers(arch: str, *, stem, num_classes: int, image_size: int) -> list[Layer]:
    """All of a network, in order; nothing is computed."""
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
    """2 a multiply-add; a training step is three times a forward pass."""
    passes = 3 if mode == "train" else 1
    return 2 * passes * batch_size * sum(layer.multiplications for layer in network)


def step_bytes(layer: Layer, mode: str, batch_size: int, itemsize: int) -> int:
    """Of one layer; weights are float32 or wider in training."""
    values = OUTPUT_PASSES[mode] * layer.outputs + INPUT_PASSES[mode] * layer.inputs
    wide = max(4, itemsize) if mode == "train" else itemsize
    return batch_size * values * itemsize + WEIGHT_PASSES[mode] * layer.weights * wide


def floor_seconds(network, mode, batch_size, itemsize, ceilings: dict) -> float:
    """Of a step, at `ceilings`: {"flops": a second, "bytes": a second}."""
    return sum(
        max(
            step_flops([layer], mode, batch_size) / ceilings["flops"],
            step_bytes(layer, mode, batch_size, itemsize) / ceilings["bytes"],
        )
        for layer in network
    )
