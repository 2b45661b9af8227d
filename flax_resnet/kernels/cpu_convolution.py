"""Convolution lowerings for XLA's CPU backend, where its own path collapses, on small maps and in
loops, and where it does more than it has to, with 1x1 kernels and with many channels.

Small maps. Two cores of an AMD EPYC, jaxlib 0.10.2, batch 64, forward + both gradients, medians of
9 calls in turns, in ms; the last three rows are left to XLA:

| convolution                            | XLA   | as a product |
|----------------------------------------|-------|--------------|
| 3x3, 512 -> 512 channels, 1x1 map      | 46    | 2.0          |
| 3x3, 256 -> 256 channels, 2x2 map      | 89    | 6.7          |
| 3x3 stride 2, 128 -> 256, 4x4 -> 2x2   | 19    | 3.3          |
| 3x3 stride 2, 256 -> 512, 4x4 -> 2x2   | 142   | 12.5         |
| 3x3, 256 -> 256 channels, 3x3 map      | 11.2  | 12.7         |
| 3x3, 512 -> 512 channels, 4x4 map      | 76    | 85           |
| 3x3, 64 -> 64 channels, 8x8 map        | 5.7   | 8.3          |

Loops. A weight gradient in the body of a `lax.scan`, one core, batch 16, milliseconds:

| convolution                            | XLA   | here | XLA and here without a loop |
|----------------------------------------|-------|------|-----------------------------|
| 3x3, 64 -> 64 channels, 32x32 map      | 1514  | 27.7 | 27.8, 27.9                  |
| 3x3 stride 2, 64 -> 128, 32x32         | 830   | 13.9 | 14.1, 14.0                  |
| 3x3, 256 -> 256 channels, 8x8 map      | 1370  | 23.1 | 25.8, 23.1                  |
| 7x7 stride 2, 3 -> 64, 112x112         | 952   | 28.0 | 27.5, 27.4                  |

1x1 kernels, weight gradient. One core with another job on the other, memory kept between calls,
medians of 7 calls in turns, in ms:

| batch, channels, map          | XLA  | here |
|-------------------------------|------|------|
| 16, 64 -> 64, 56x56           | 13.4 | 8.4  |
| 16, 64 -> 256, 56x56          | 57.3 | 27.1 |
| 16, 256 -> 64, 56x56          | 78.6 | 27.9 |
| 16, 512 -> 128, 28x28         | 29.4 | 17.7 |
| 16, 1024 -> 256, 14x14        | 23.2 | 17.9 |
| 16, 2048 -> 512, 7x7          | 19.6 | 18.3 |
| 128, 16 -> 64, 32x32          | 33.1 | 11.0 |

Many channels. Two cores, float32, 3x3, as many channels out as in, medians of 7 calls in turns, in
ms; the last four rows are left to XLA:

| batch, channels, map | forward: XLA | Winograd | weight gradient: XLA | Winograd |
|----------------------|--------------|----------|----------------------|----------|
| 128, 512, 4x4        | 49.8         | 30.2     | 50.9                 | 36.6     |
| 128, 256, 8x8        | 52.0         | 33.3     | 57.5                 | 44.0     |
| 128, 256, 4x4        | 13.8         | 9.6      | 14.3                 | 11.8     |
| 32, 512, 4x4         | 14.6         | 10.4     | 15.0                 | 11.3     |
| 16, 512, 7x7         | 20.1         | 17.2     | 21.0                 | 19.5     |
| 16, 256, 14x14       | 23.9         | 15.0     | 22.5                 | 19.9     |
| 8, 512, 4x4          | 4.7          | 5.5      | 4.3                  | 5.2      |
| 128, 512, 3x3        | 33.6         | 35.4     | 33.3                 | 40.6     |
| 128, 128, 8x8        | 13.5         | 13.0     | 15.0                 | 16.9     |
| 128, 128, 16x16      | 51.6         | 45.6     | 58.4                 | 59.4     |

Its error in float32 was 1.8 to 1.9 times XLA's, and 0.6 to 1.8 times that of PyTorch's convolution.

Grouped convolutions are left to XLA.

Used through `nnx.Conv(conv_general_dilated=...)`; a jaxlib without the collapse retires the file.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from flax_resnet.kernels import winograd

LARGEST_OUTPUT = 2
"""Pixels a side of the output up to which a matrix product wins."""

SMALLEST_TILED, MANY_CHANNELS, MANY_TILES = 4, 256, 128
"""Pixels a side, channels on both sides and tiles of 2x2 outputs from which Winograd's algorithm
wins."""

COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Per-jit options for the CPU: the default sends convolutions to YNNPACK. On an Intel Xeon with AMX
that is 1.3 to 4 times slower, on an AMD EPYC equal within the noise
(`results/remedies-cpu-*.json`, library-options)."""


def conv_general_dilated(
    lhs, rhs, window_strides, padding, *, feature_group_count=1, rhs_dilation=None, **kwargs
):
    """`lax.conv_general_dilated` in NHWC / HWIO, as a matrix product where that is faster.

    Args:
      lhs: `[B, H, W, C]` images.
      rhs: `[kh, kw, C / groups, O]` kernel.
      window_strides, padding: two strides; two (low, high) pairs.

    Returns:
      `[B, H', W', O]`, the same numbers but for the order of summation.
    """
    dilated = rhs_dilation is not None and tuple(rhs_dilation) != (1, 1)
    if (
        jax.default_backend() == "cpu"
        and feature_group_count == 1
        and not dilated
        and not isinstance(padding, str)
    ):
        strides, padding = tuple(window_strides), tuple(map(tuple, padding))
        if (*rhs.shape[:2], *padding) == (1, 1, (0, 0), (0, 0)):
            pixels = lhs[:, :: strides[0], :: strides[1]]
            return _pointwise(pixels, rhs, kwargs.get("precision"))
        wide = lhs.dtype.itemsize >= 4  # transforms would cost a narrow type digits
        if wide and _winograd_is_faster(lhs.shape, rhs.shape, strides, padding):
            return winograd.convolution(lhs, rhs)
        product = _product_is_faster(lhs.shape, rhs.shape, strides, padding)
        lowering = _matrix_product if product else _convolution
        return lowering(lhs, rhs, strides, padding, kwargs.get("precision"))
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        feature_group_count=feature_group_count,
        rhs_dilation=rhs_dilation,
        **kwargs,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pointwise(lhs, rhs, precision):
    """A 1x1 convolution with stride 1. As a product XLA computes it anyway, but not the gradient of
    the kernel, for which it transposes images and gradient."""
    return jnp.dot(lhs, rhs[0, 0], precision=precision)


def _pointwise_forward(lhs, rhs, precision):
    return _pointwise(lhs, rhs, precision), (lhs, rhs)


def _pointwise_backward(precision, saved, gradient):
    lhs, rhs = saved
    kernel = _sum_over_pixels(lhs, gradient, precision)
    return jnp.dot(gradient, rhs[0, 0].T, precision=precision), kernel[None, None]


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _sum_over_pixels(left, right, precision):
    """`[B, H, W, I]`, `[B, H, W, O]` -> `[I, O]`, the product of left and right of every pixel.

    The left one is transposed in memory, so this had better be the one with fewer channels. Without
    the barrier XLA would turn that product round again, and the kernel that it calls then is slow.
    """
    if left.shape[-1] > right.shape[-1]:
        return lax.optimization_barrier(_sum_over_pixels(right, left, precision)).T
    return jnp.einsum("bhwi,bhwo->io", left, right, precision=precision)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(lhs, rhs, strides, padding, precision):
    """A convolution whose gradients are plain ones too.

    XLA writes them with permuted dimensions, f01b_i01o->01bf and b01f_01oi->b01f. It brings these
    in order afterwards, but not inside a loop, where a naive kernel is left to compute them.
    """
    return _plain(lhs, rhs, strides, padding, precision)


def _plain(lhs, rhs, strides, padding, precision, **options):
    return lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
        **options,
    )


def _forward(lhs, rhs, strides, padding, precision):
    return _plain(lhs, rhs, strides, padding, precision), (lhs, rhs)


def _backward(strides, padding, precision, saved, gradient):
    lhs, rhs = saved
    return (
        _image_gradient(lhs.shape, rhs, gradient, strides, padding, precision),
        _kernel_gradient(lhs, rhs.shape, gradient, strides, padding, precision),
    )


def _image_gradient(shape, rhs, gradient, strides, padding, precision):
    """The kernel, turned round, slides over the gradient with `strides` between its pixels."""
    around = []
    for i in (0, 1):
        low = rhs.shape[i] - 1 - padding[i][0]
        spread = strides[i] * (gradient.shape[1 + i] - 1) + 1
        around.append((low, shape[1 + i] + rhs.shape[i] - 1 - low - spread))
    turned = rhs[::-1, ::-1].transpose(0, 1, 3, 2)
    return _plain(gradient, turned, (1, 1), around, precision, lhs_dilation=strides)


def _kernel_gradient(lhs, shape, gradient, strides, padding, precision):
    """Channels take the place of images, images that of channels, the gradient slides over the
    padded images in steps of one pixel with `strides` between its own."""
    high = (  # just enough for an output of the size of the kernel
        shape[i] + strides[i] * (gradient.shape[1 + i] - 1) - lhs.shape[1 + i] - padding[i][0]
        for i in (0, 1)
    )
    kernel = _plain(
        lhs.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        [(low, high) for (low, _), high in zip(padding, high, strict=True)],
        precision,
        rhs_dilation=strides,
    )
    return kernel.transpose(1, 2, 0, 3)


_convolution.defvjp(_forward, _backward)


def _output_size(image, kernel, strides, padding) -> tuple[int, int]:
    """Rows and columns of the output of a convolution."""
    return tuple(
        (image[1 + axis] + sum(padding[axis]) - kernel[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )


def _product_is_faster(image, kernel, strides, padding) -> bool:
    return max(_output_size(image, kernel, strides, padding)) <= LARGEST_OUTPUT


def _winograd_is_faster(image, kernel, strides, padding) -> bool:
    batch, rows, columns, _ = image
    return (
        (kernel[:2], strides, padding) == ((3, 3), (1, 1), ((1, 1), (1, 1)))
        and min(rows, columns) >= SMALLEST_TILED
        and min(kernel[2:]) >= MANY_CHANNELS
        and not is_symbolic_dim(batch)  # of an export, which a GPU may run as well
        and batch * -(-rows // 2) * -(-columns // 2) >= MANY_TILES
    )


def _matrix_product(lhs, rhs, strides, padding, precision):
    """Every kernel position is one strided slice; all of them meet the kernel in one product.

    Positions that see nothing but padding are left out: of a 3x3 kernel on a 1x1 map, eight.
    """
    rows, columns = _output_size(lhs.shape, rhs.shape, strides, padding)
    taps = [
        (i, j)
        for i in _useful(lhs.shape[1], rhs.shape[0], rows, strides[0], padding[0])
        for j in _useful(lhs.shape[2], rhs.shape[1], columns, strides[1], padding[1])
    ]
    lhs = jnp.pad(lhs, ((0, 0), *map(tuple, padding), (0, 0)))
    patches = [
        lhs[
            :,
            i : i + strides[0] * (rows - 1) + 1 : strides[0],
            j : j + strides[1] * (columns - 1) + 1 : strides[1],
        ]
        for i, j in taps
    ]
    patches = jnp.concatenate(patches, axis=-1)  # [B, H', W', taps * C], as the kernel's rows
    kernel = rhs if len(taps) == math.prod(rhs.shape[:2]) else jnp.stack([rhs[t] for t in taps])
    return jnp.dot(patches, kernel.reshape(-1, rhs.shape[-1]), precision=precision)


def _useful(size, kernel, output, stride, padding):
    """Kernel positions along one axis that meet a pixel at some output."""
    return [
        k
        for k in range(kernel)
        if any(0 <= k + stride * o - padding[0] < size for o in range(output))
    ]
