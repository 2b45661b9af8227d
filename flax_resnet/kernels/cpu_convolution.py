"""Convolutions that XLA's CPU backend computes slowly, written there as other operations.

A program for another platform holds `lax.conv_general_dilated` and JAX's own gradients of it.
README.md says what each lowering is worth.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

LARGEST_OUTPUT = 2
"""Pixels a side of the output up to which a matrix product is faster than a convolution."""


def compiler_options(platform: str, kernels: str = "auto") -> dict:
    """Options of `jax.jit` for a program that runs on this platform.

    On a CPU they keep convolutions from YNNPACK, which is XLA's default there.
    """
    on = platform == "cpu" and kernels == "auto"
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if on else {}


def conv_general_dilated(
    lhs, rhs, window_strides, padding, *, feature_group_count=1, rhs_dilation=None, **kwargs
):
    """`lax.conv_general_dilated` in NHWC / HWIO, with this file's lowerings in programs for a CPU.

    Grouped and dilated convolutions are the library's on every platform.

    Args:
      lhs: `[B, H, W, C]` images.
      rhs: `[kh, kw, C / groups, O]` kernel.
      window_strides, padding: two strides; two (low, high) pairs.

    Returns:
      `[B, H', W', O]`, the library's numbers up to the order of summation.
    """
    dilated = rhs_dilation is not None and tuple(rhs_dilation) != (1, 1)
    if feature_group_count == 1 and not dilated and not isinstance(padding, str):
        strides, padding = tuple(window_strides), tuple(map(tuple, padding))
        return _convolution(lhs, rhs, strides, padding, kwargs.get("precision"))
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        feature_group_count=feature_group_count,
        rhs_dilation=rhs_dilation,
        **kwargs,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolution(lhs, rhs, strides, padding, precision):
    """The gradients are explicit, so that JAX differentiates no `platform_dependent`."""
    return _forward(lhs, rhs, strides, padding, precision)


@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)  # traced once a shape
def _forward(lhs, rhs, *how):
    if not _product_is_faster(lhs.shape, rhs.shape, *how[:2]):
        return _plain(lhs, rhs, *how)
    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=lambda lhs, rhs: _matrix_product(lhs, rhs, *how),
        default=lambda lhs, rhs: _plain(lhs, rhs, *how),
    )


def _forward_saving(lhs, rhs, *how):
    return _forward(lhs, rhs, *how), (lhs, rhs)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _backward(strides, padding, precision, saved, gradient):
    lhs, rhs = saved
    how = strides, padding, precision
    if _product_is_faster(lhs.shape, rhs.shape, strides, padding):
        cpu = partial(_transposed, lambda lhs, rhs: _matrix_product(lhs, rhs, *how))
    else:
        cpu = partial(_plain_gradients, how)
    library = partial(_transposed, lambda lhs, rhs: _plain(lhs, rhs, *how))
    return lax.platform_dependent(lhs, rhs, gradient, cpu=cpu, default=library)


_convolution.defvjp(_forward_saving, _backward)


def _transposed(function, lhs, rhs, gradient):
    """JAX's gradients of a function that is linear in both arguments, without its value."""
    to_lhs = jax.linear_transpose(lambda lhs: function(lhs, rhs), lhs)
    to_rhs = jax.linear_transpose(lambda rhs: function(lhs, rhs), rhs)
    return *to_lhs(gradient), *to_rhs(gradient)


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


def _plain_gradients(how, lhs, rhs, gradient):
    """Both gradients as convolutions in NHWC / HWIO.

    JAX writes them with permuted dimensions, f01b_i01o->01bf and b01f_01oi->b01f. XLA brings these
    in order afterwards, but not inside a loop, where it computes them with a naive kernel.
    """
    return _image_gradient(lhs.shape, rhs, gradient, *how), _kernel_gradient(
        lhs, rhs.shape, gradient, *how
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
    """The gradient slides over the padded images, with `strides` between its pixels.

    Channels take the place of images, and images that of channels.
    """
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


def _output_size(image, kernel, strides, padding) -> tuple[int, int]:
    """Rows and columns of the output of a convolution."""
    return tuple(
        (image[1 + axis] + sum(padding[axis]) - kernel[axis]) // strides[axis] + 1
        for axis in (0, 1)
    )


def _product_is_faster(image, kernel, strides, padding) -> bool:
    return max(_output_size(image, kernel, strides, padding)) <= LARGEST_OUTPUT


def _matrix_product(lhs, rhs, strides, padding, precision):
    """The convolution as one product of all strided slices, one a kernel position, and the kernel.

    Positions that meet nothing but padding are left out: eight of a 3x3 kernel on a 1x1 map.
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
