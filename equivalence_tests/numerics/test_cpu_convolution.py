"""The convolutions of `kernels/cpu_convolution.py` give the right numbers by fast kernels.

The facts are read from the compiled program: in a loop, dim_labels other than b01f_01io are
computed by a naive kernel; on small maps any convolution is slow; __ynn_fusion is slow anywhere.
If a control fails, XLA has become fast by itself, and the lowering is no longer needed.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resnet.kernels import cpu_convolution

PLAIN_LABELS = {"b01f_01io->b01f"}


def library(images, kernel, stride, padding):
    return cpu_convolution._plain(images, kernel, (stride,) * 2, ((padding,) * 2,) * 2, None)


def ours(images, kernel, stride, padding):
    padding = ((padding,) * 2,) * 2
    return cpu_convolution.conv_general_dilated(images, kernel, (stride,) * 2, padding)


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
    [
        (12, 3, 1, 1),
        (13, 3, 2, 1),
        (14, 7, 2, 3),
        (11, 5, 3, 0),
        (9, 3, 2, 2),
        (8, 1, 1, 0),
        (9, 1, 2, 0),
    ],
)
def test_both_gradients_are_the_librarys(x64, size, kernel, stride, padding):
    arrays = example(size, kernel, np.float64)
    for got, expected in zip(
        gradients(ours, *arrays, stride, padding),
        gradients(library, *arrays, stride, padding),
        strict=True,
    ):
        assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)


def value_and_gradients(convolution, images, kernel, stride=1, padding=1):
    arguments = images, kernel, stride, padding
    return convolution(*arguments), *gradients(convolution, *arguments)


def assert_the_librarys(convolution, *arguments):
    results = [value_and_gradients(way, *arguments) for way in (convolution, library)]
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) <= 1e-12 * np.linalg.norm(expected)


def product(images, kernel, stride, padding):
    strides, paddings = (stride,) * 2, ((padding,) * 2,) * 2
    return cpu_convolution._matrix_product(images, kernel, strides, paddings, None)


@pytest.mark.parametrize(
    "size,kernel,stride,padding",
    [
        (1, 3, 1, 1),
        (2, 3, 1, 1),
        (3, 3, 2, 1),
        (4, 3, 2, 1),
        (4, 3, 1, 1),
        pytest.param(4, 7, 2, 3, marks=pytest.mark.slow),
        (5, 5, 2, 2),
    ],
)
def test_a_matrix_product_is_the_convolution(x64, size, kernel, stride, padding):
    """The gradients of the product are those of the convolution too."""
    assert_the_librarys(product, *example(size, kernel, np.float64), stride, padding)


@pytest.mark.parametrize(
    "size,kernel,stride,groups,multiplied",
    [
        (1, 3, 1, 1, True),
        (2, 3, 1, 1, True),
        (3, 3, 2, 1, True),
        (4, 3, 2, 1, True),
        (4, 7, 2, 1, True),
        (3, 3, 1, 1, False),
        (4, 3, 1, 1, False),
        (8, 3, 2, 1, False),
        (4, 1, 2, 1, True),
        (8, 1, 2, 1, False),  # a shortcut
        (8, 1, 1, 1, False),
        (2, 3, 1, 2, False),  # groups are left to XLA
    ],
)
def test_what_is_multiplied_and_what_is_convolved(size, kernel, stride, groups, multiplied):
    images = np.ones((2, size, size, 4), np.float32)
    weights = np.ones((kernel, kernel, 4 // groups, 6), np.float32)
    padding = ((kernel // 2,) * 2,) * 2

    def value(images, weights):
        result = cpu_convolution.conv_general_dilated(
            images, weights, (stride,) * 2, padding, feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.sin(result).sum()

    with_gradients = jax.jit(jax.value_and_grad(value, (0, 1)))
    program = with_gradients.lower(images, weights).compile().as_text()
    assert ("convolution(" in program) != multiplied


def ynn_fusions(options) -> int:
    """The number of YNNPACK fusions in a convolution that is compiled with these options."""
    compiled = jax.jit(lambda *a: library(*a, 1, 1), compiler_options=options)
    images = np.ones((8, 32, 32, 64), np.float32)
    kernel = np.ones((3, 3, 64, 64), np.float32)
    return compiled.lower(images, kernel).compile().as_text().count("__ynn_fusion")


def test_convolutions_are_kept_from_ynnpack():
    assert ynn_fusions(cpu_convolution.compiler_options("cpu")) == 0


@pytest.mark.control
def test_without_the_option_they_go_there():
    assert ynn_fusions({}) > 0


def labels_in_a_loop(convolution, stride) -> set[str]:
    """The labels of the convolutions in a compiled loop of updates by both gradients."""

    def updates(images, kernel):
        def update(arrays, _):
            changes = gradients(convolution, *arrays, stride, 1)
            return tuple(x - change for x, change in zip(arrays, changes, strict=True)), None

        return lax.scan(update, (images, kernel), None, length=3)[0]

    compiled = jax.jit(updates, compiler_options=cpu_convolution.compiler_options("cpu"))
    text = compiled.lower(*example(12, 3, np.float32)).compile().as_text()
    return set(re.findall(r"dim_labels=(\w+->\w+)", text))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_loop_keeps_to_plain_convolutions(stride):
    assert labels_in_a_loop(ours, stride) == PLAIN_LABELS


@pytest.mark.control
def test_the_library_does_not():
    assert labels_in_a_loop(library, 1) - PLAIN_LABELS
