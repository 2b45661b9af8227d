"""`models/cpu_convolution.py`: right numbers, and fast kernels.

The facts are read from the compiled program: in a loop, dim_labels other than b01f_01io are
computed by a naive kernel; on small maps any convolution is slow; __ynn_fusion is slow anywhere.
When a control fails, XLA has learned to do without, and so can we.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from torch.nn import functional as F

from equivalence_tests.parity import tolerances
from flax_resnet.kernels import cpu_convolution, winograd

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
    [(12, 3, 1, 1), (13, 3, 2, 1), (14, 7, 2, 3), (11, 5, 3, 0), (9, 3, 2, 2)],
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
        (4, 7, 2, 3),
        (5, 5, 2, 2),
    ],
)
def test_a_matrix_product_is_the_convolution(x64, size, kernel, stride, padding):
    """And so are its gradients."""
    assert_the_librarys(product, *example(size, kernel, np.float64), stride, padding)


def pointwise(images, kernel, stride, padding):
    strides, paddings = (stride,) * 2, ((padding,) * 2,) * 2
    return cpu_convolution.conv_general_dilated(images, kernel, strides, paddings)


@pytest.mark.parametrize("channels", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_pointwise_convolution_is_one(x64, channels, stride):
    """And so are its gradients."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((2, 8, 9, channels[0]), (1, 1, *channels))]
    assert_the_librarys(pointwise, *arrays, stride, 0)


def pointwise_gradient(convolution, channels) -> str:
    """The compiled program of the gradient of a pointwise kernel."""

    def value(kernel, images):
        return jnp.sin(convolution(images, kernel, 1, 0)).sum()

    images = jax.ShapeDtypeStruct((8, 16, 16, channels[0]), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1, 1, *channels), jnp.float32)
    return jax.jit(jax.grad(value)).lower(kernel, images).compile().as_text()


def most_channels_transposed(program) -> int:
    """Of arrays as large as the images."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program)
    sizes = [np.prod([int(length) for length in shape.split(",")]) for shape in shapes]
    return max(sizes) // (8 * 16 * 16)


def contracted(program) -> set[tuple[str, str]]:
    """Which dimensions of left and right: Eigen is fast with rows by columns."""
    return set(re.findall(r"lhs_contracting_dims=({\d}), rhs_contracting_dims=({\d})", program))


ROWS_BY_COLUMNS = {("{1}", "{0}")}


@pytest.mark.parametrize("channels", [(64, 256), (256, 64)])
def test_a_pointwise_gradient_transposes_the_fewer_channels_alone(channels):
    program = pointwise_gradient(pointwise, channels)
    assert most_channels_transposed(program) == min(channels)
    assert contracted(program) == ROWS_BY_COLUMNS


@pytest.mark.control
def test_the_library_transposes_both():
    assert most_channels_transposed(pointwise_gradient(library, (64, 256))) == 256


@pytest.mark.control
def test_without_a_barrier_the_product_is_turned_round(monkeypatch):
    monkeypatch.setattr(lax, "optimization_barrier", lambda x: x)
    assert contracted(pointwise_gradient(pointwise, (256, 64))) != ROWS_BY_COLUMNS


def tiled(images, kernel, stride, padding):
    assert (stride, padding) == (1, 1)
    return winograd.convolution(images, kernel)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])  # a pixel more in the other direction
def test_winograds_algorithm_is_the_convolution(x64, size):
    """And so are its gradients."""
    assert_the_librarys(tiled, *example(size, 3, np.float64))


@pytest.mark.control
@pytest.mark.parametrize("name", ["_PIXELS", "_KERNEL", "_OUTPUT"])
def test_with_a_number_wrong_it_is_not(x64, monkeypatch, name):
    matrix = getattr(winograd, name).copy()
    matrix[-1, -1] += 1
    monkeypatch.setattr(winograd, name, matrix)
    arrays = example(4, 3, np.float64)
    for got, expected in zip(
        value_and_gradients(tiled, *arrays), value_and_gradients(library, *arrays), strict=True
    ):
        assert np.linalg.norm(got - expected) > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("channels, size", [(256, 8), (512, 4), (512, 7)])
def test_winograds_rounding_is_within_twice_torchs(channels, size):
    """Images as behind a ReLU, weights as before training; each to be told from float64."""
    rng = np.random.default_rng(0)
    images = np.maximum(rng.standard_normal((16, size, size, channels)), 0)
    kernel = rng.standard_normal((3, 3, channels, channels)) / np.sqrt(9 * channels)
    gradient = rng.standard_normal(images.shape)
    arrays = [array.astype(np.float32) for array in (images, kernel, gradient)]
    exact = in_torch(*(array.astype(np.float64) for array in arrays))
    for got, theirs, expected in zip(in_jax(*arrays), in_torch(*arrays), exact, strict=True):
        ours, torchs = (
            np.linalg.norm(result - expected) / np.linalg.norm(expected) for result in (got, theirs)
        )
        ulps = tolerances.BUDGET_ULPS * np.finfo(np.float32).eps
        assert ours <= tolerances.BUDGET_FACTOR * torchs + ulps


def in_jax(images, kernel, gradient):
    result, pullback = jax.vjp(winograd.convolution, images, kernel)
    return result, *pullback(gradient)


def in_torch(images, kernel, gradient):
    images = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    result = F.conv2d(images, weight, padding=1)
    result.backward(torch.tensor(gradient.transpose(0, 3, 1, 2)))
    results = [t.detach().numpy() for t in (result, images.grad, weight.grad)]
    return [t.transpose(order) for t, order in zip(results, ORDERS, strict=True)]


ORDERS = (0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0)


def compiled(images, kernel, stride=1, dtype=jnp.float32):
    """The program of a convolution and its gradients, padded with a pixel."""

    def value(images, kernel):
        return jnp.sin(
            cpu_convolution.conv_general_dilated(images, kernel, (stride,) * 2, ((1, 1),) * 2)
        ).sum()

    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (images, kernel)]
    options = cpu_convolution.COMPILER_OPTIONS
    with_gradients = jax.jit(jax.value_and_grad(value, (0, 1)), compiler_options=options)
    return with_gradients.lower(*arrays).compile()


MANY = (8, 8, 8, 256), (3, 3, 256, 256)


def test_many_channels_take_half_of_the_products():
    """16 for 36, and the transforms."""
    ours = compiled(*MANY)
    assert "convolution(" not in ours.as_text()
    images, kernel = MANY
    products = 3 * 2 * np.prod(images) * np.prod(kernel) / kernel[2]
    assert ours.cost_analysis()["flops"] < 0.55 * products


@pytest.mark.control
def test_the_librarys_takes_all_of_them(monkeypatch):
    monkeypatch.setattr(cpu_convolution, "MANY_CHANNELS", 1_000)
    images, kernel = MANY
    pixels_within = (3 * images[1] - 2) ** 2 / (3 * images[1]) ** 2  # the others are zeros
    products = 3 * 2 * np.prod(images) * np.prod(kernel) / kernel[2] * pixels_within
    assert compiled(*MANY).cost_analysis()["flops"] > 0.99 * products


@pytest.mark.parametrize(
    "images, kernel, options",
    [
        ((7, 8, 8, 256), (3, 3, 256, 256), {}),  # too few tiles
        ((64, 3, 3, 256), (3, 3, 256, 256), {}),  # half of a tile would be padding
        ((8, 8, 8, 128), (3, 3, 128, 256), {}),
        ((8, 8, 8, 256), (3, 3, 256, 128), {}),
        ((8, 8, 8, 256), (1, 1, 256, 256), {}),
        ((32, 8, 8, 256), (3, 3, 256, 256), dict(stride=2)),
        (*MANY, dict(dtype=jnp.bfloat16)),
    ],
)
def test_others_are_left_to_the_library(images, kernel, options):
    assert "convolution(" in compiled(images, kernel, **options).as_text()


def test_an_export_for_any_batch_keeps_the_convolution():
    (batch,) = jax.export.symbolic_shape("batch")
    images, kernel = MANY
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((batch, *images[1:]), kernel)]
    convolve = jax.jit(lambda *a: cpu_convolution.conv_general_dilated(*a, (1, 1), ((1, 1),) * 2))
    assert "stablehlo.convolution" in jax.export.export(convolve)(*arrays).mlir_module()


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
        (8, 1, 2, 1, True),  # a shortcut
        (9, 1, 2, 1, True),
        (8, 1, 1, 1, True),  # pointwise
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
    """In the program of a convolution that is compiled with these options."""
    compiled = jax.jit(lambda *a: library(*a, 1, 1), compiler_options=options)
    images = np.ones((8, 32, 32, 64), np.float32)
    kernel = np.ones((3, 3, 64, 64), np.float32)
    return compiled.lower(images, kernel).compile().as_text().count("__ynn_fusion")


def test_convolutions_are_kept_from_ynnpack():
    assert ynn_fusions(cpu_convolution.COMPILER_OPTIONS) == 0


@pytest.mark.control
def test_without_the_option_they_go_there():
    assert ynn_fusions({}) > 0


def labels_in_a_loop(convolution, stride) -> set[str]:
    """Of the convolutions in a compiled loop of updates by both gradients."""

    def updates(images, kernel):
        def update(arrays, _):
            changes = gradients(convolution, *arrays, stride, 1)
            return tuple(x - change for x, change in zip(arrays, changes, strict=True)), None

        return lax.scan(update, (images, kernel), None, length=3)[0]

    compiled = jax.jit(updates, compiler_options=cpu_convolution.COMPILER_OPTIONS)
    text = compiled.lower(*example(12, 3, np.float32)).compile().as_text()
    return set(re.findall(r"dim_labels=(\w+->\w+)", text))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_loop_keeps_to_plain_convolutions(stride):
    assert labels_in_a_loop(ours, stride) == PLAIN_LABELS


@pytest.mark.control
def test_the_library_does_not():
    assert labels_in_a_loop(library, 1) - PLAIN_LABELS
