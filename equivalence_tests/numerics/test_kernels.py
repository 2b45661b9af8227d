"""Where this project does not call the library, for speed: the same numbers, and a program without
what is slow. Each fact has the library's own way as its control: where that passes, ours can go.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from equivalence_tests.benchmark import lowerings
from equivalence_tests.parity import inputs
from flax_resnet.kernels import cpu_convolution
from flax_resnet.kernels.cpu_sum import sum_of_pixels
from flax_resnet.models import layers

pytestmark = pytest.mark.quick


def program(function, *arrays) -> str:
    """The compiled program's text."""
    compiled = jax.jit(function, compiler_options=cpu_convolution.COMPILER_OPTIONS)
    return compiled.lower(*arrays).compile().as_text()


def operations(text: str) -> set[str]:
    return set(re.findall(r" = \S+ ([a-z-]+)\(", text))


def pool_gradient(pool, x, window, stride, padding):
    def value(x):
        highest = pool(x, window, stride, padding=padding)
        weights = jnp.arange(1, highest.size + 1, dtype=x.dtype).reshape(highest.shape)
        return (weights * highest).sum()

    return jax.jit(jax.grad(value))(x)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (9, 12)])
@pytest.mark.parametrize("window, stride, padding", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
def test_of_equal_pixels_the_first_takes_the_gradient(size, window, stride, padding, x64):
    x = inputs.random_numbers().integers(0, 3, (2, *size, 4)).astype(np.float64)  # ties
    ours = pool_gradient(layers.max_pool, x, window, stride, padding)
    assert np.array_equal(
        ours, pool_gradient(lowerings.window_max_pool, x, window, stride, padding)
    )
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    highest = F.max_pool2d(theirs, window, stride, padding).permute(0, 2, 3, 1)
    (torch.arange(1, highest.numel() + 1).reshape(highest.shape) * highest).sum().backward()
    assert np.array_equal(ours, theirs.grad.permute(0, 2, 3, 1))


SLOW_WINDOWS = {"reduce-window", "select-and-scatter", "scatter"}


def slow_windows(pool) -> set[str]:
    x = np.ones((4, 8, 8, 16), np.float32)
    return SLOW_WINDOWS & operations(program(lambda x: pool_gradient(pool, x, 3, 2, 1), x))


def test_a_max_pool_is_slices():
    assert not slow_windows(layers.max_pool)


@pytest.mark.control
def test_the_library_s_is_a_window():
    assert slow_windows(lowerings.window_max_pool)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (8, 8), (5, 7), (6, 5), (31, 13)])
def test_sums_of_pixels_keep_to_the_bound_of_pairs(size):
    """Higham, Accuracy and Stability of Numerical Algorithms, 4.2: as many roundings as additions
    that a number takes part in, here two a halving."""
    x = 5 + inputs.random_numbers().standard_normal((3, *size, 16)).astype(np.float32)
    rounding = 2 * np.ceil(np.log2(np.prod(size))) * 2.0**-24
    error = np.abs(np.float64(sum_of_pixels(jnp.asarray(x))) - x.sum((1, 2), np.float64))
    # 1.001: terms of second order
    assert (error <= 1.001 * rounding * np.abs(x).sum((1, 2), np.float64)).all()


def test_a_batch_of_vectors_has_one_pixel():
    x = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(sum_of_pixels(jnp.asarray(x)), x)


def loops_over_pixels(function) -> int:
    text = program(lambda x: function(jnp.square(x)), np.ones((4, 16, 16, 32), np.float32))
    return len(re.findall(r" reduce(-window)?\(", text))


def test_sums_of_pixels_are_additions():
    assert loops_over_pixels(sum_of_pixels) == 0


@pytest.mark.control
def test_the_library_s_sums_are_loops():
    assert loops_over_pixels(lowerings.loop_sum) > 0


def questions_for_a_sharding(function) -> int:
    """How often tracing asks a tracer where it lies, which it cannot tell."""
    asked = []
    with mock.patch.object(jax.core.Tracer, "sharding", property(asked.append)):
        jax.make_jaxpr(function)(np.ones((2, 3, 3, 4), np.float32))
    return len(asked)


def test_statistics_are_set_without_a_question():
    assert questions_for_a_sharding(lambda x: layers.BatchNorm(4)(x)) == 0


@pytest.mark.control
def test_the_library_s_assignment_asks():
    def assign(x):
        nnx.BatchStat(jnp.zeros_like(x))[...] = x

    assert questions_for_a_sharding(assign) > 0


def additions_of_a_bias(relu) -> int:
    """How often conv - bias - ReLU - conv and its gradient compute conv + bias."""

    def loss(kernels, x, bias):
        hidden = relu(convolution(x, kernels[0]) + layers._along(bias, x))
        return jnp.square(convolution(hidden, kernels[1])).sum()

    def convolution(x, kernel):
        return cpu_convolution.conv_general_dilated(x, kernel, (1, 1), [(1, 1)] * 2)

    kernel, bias = np.ones((3, 3, 8, 8), np.float32), np.ones(8, np.float32)
    text = program(jax.grad(loss), [kernel] * 2, np.ones((4, 12, 12, 8), np.float32), bias)
    return len(re.findall(r"f32\[4,12,12,8\]\S* add\(", text))


def test_what_a_relu_gives_is_kept():
    """Once forward and once for the sign; the kernel's gradient takes what is there."""
    assert additions_of_a_bias(layers.relu) == 2


@pytest.mark.control
def test_what_the_library_s_gives_is_computed_again():
    assert additions_of_a_bias(nnx.relu) == 3


def test_relu_keeps_nan():
    x = np.array([np.nan, -np.inf, -1, -0.0, 0.0, 1, np.inf], np.float32)
    assert np.array_equal(layers.relu(jnp.asarray(x)), F.relu(torch.tensor(x)), equal_nan=True)
