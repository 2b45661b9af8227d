"""Convolution lowerings for XLA's CPU backend, where its own path collapses on small maps.

Measured on 2 cores with jaxlib 0.10.2, batch 64, forward + both gradients, milliseconds:

| convolution                            | XLA   | here |
|----------------------------------------|-------|------|
| 3x3, 256 -> 256 channels, 2x2 map      | 114   | 7.6  |
| 3x3, 512 -> 512 channels, 1x1 map      | 49    | 11   |
| 3x3 stride 2, 128 -> 256, 4x4 -> 2x2   | 38    | 3.4  |
| 3x3, 128 -> 128 channels, 4x4 map      | 22    | 7.6  |
| 1x1 stride 2, 64 -> 128, 32x32         | 28    | 16   |
| 3x3, 64 -> 64 channels, 8x8 map        | 13    | 17.5 |

Used through `nnx.Conv(conv_general_dilated=...)`; a jaxlib without the collapse retires the file.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_OUTPUT = 4
"""Pixels a side of the output up to which a matrix product wins (last rows of the table)."""

COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Per-jit options for the CPU: the default sends convolutions to YNNPACK, 1.3 to 4 times slower."""


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
        and _product_is_faster(lhs.shape, rhs.shape, window_strides, padding)
    ):
        return _matrix_product(lhs, rhs, window_strides, padding, kwargs.get("precision"))
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        feature_group_count=feature_group_count,
        rhs_dilation=rhs_dilation,
        **kwargs,
    )


def _output_size(image, kernel, strides, padding) -> tuple[int, int]:
    """Rows and columns of the output of a convolution."""
    return tuple(
        (image[1 + axis] + sum(padding[axis]) - kernel[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )


def _product_is_faster(image, kernel, strides, padding) -> bool:
    if kernel[:2] == (1, 1):
        return tuple(strides) != (1, 1)
    return max(_output_size(image, kernel, strides, padding)) <= LARGEST_OUTPUT


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
