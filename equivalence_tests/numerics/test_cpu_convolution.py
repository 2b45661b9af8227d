"""The weight gradient of `models/cpu_convolution.py`: right numbers, and a fast kernel in loops.

The facts are read from the compiled program: dim_labels other than b01f_01io are computed by a
naive kernel. When the control fails, XLA has learned to do without, and so can we.
"""

import re

import jax
import numpy as np
import pytest
from jax import lax

from flax_resnet.models import cpu_convolution

PLAIN_LABELS = {"b01f_01io->b01f"}


def library(images, kernel, stride, padding):
    return cpu_convolution._plain(images, kernel, (stride,) * 2, ((padding,) * 2,) * 2, None)


def ours(images, kernel, stride, padding):
    return cpu_convolution._convolution(images, kernel, (stride,) * 2, ((padding,) * 2,) * 2, None)


def gradients(convolution, images, kernel, stride, padding):
    def objective(images, kernel):
        return (convolution(images, kernel, stride, padding) ** 3).sum()

    return jax.grad(objective, (0, 1))(images, kernel)


def example(size, kernel, dtype):
    rng = np.random.default_rng(0)
    shapes = (2, size, size + 1, 3), (kernel, kernel, 3, 5)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "size,kernel,stride,padding",
    [(12, 3, 1, 1), (13, 3, 2, 1), (14, 7, 2, 3), (8, 1, 1, 0), (11, 5, 3, 0), (9, 3, 2, 2)],
)
def test_both_gradients_are_the_librarys(x64, size, kernel, stride, padding):
    arrays = example(size, kernel, np.float64)
    for got, expected in zip(
        gradients(ours, *arrays, stride, padding),
        gradients(library, *arrays, stride, padding),
        strict=True,
    ):
        assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)


def labels_in_a_loop(convolution, stride) -> set[str]:
    """Of the convolutions in a compiled loop of weight updates."""

    def updates(images, kernel):
        def update(kernel, _):
            return kernel - gradients(convolution, images, kernel, stride, 1)[1], None

        return lax.scan(update, kernel, None, length=3)[0]

    compiled = jax.jit(updates, compiler_options=cpu_convolution.COMPILER_OPTIONS)
    text = compiled.lower(*example(12, 3, np.float32)).compile().as_text()
    return set(re.findall(r"dim_labels=(\w+->\w+)", text))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_loop_keeps_to_plain_convolutions(stride):
    assert labels_in_a_loop(ours, stride) == PLAIN_LABELS


@pytest.mark.control
def test_the_library_does_not():
    assert labels_in_a_loop(library, 1) - PLAIN_LABELS
