"""3x3 convolutions with 16 products for the 36 of four outputs: Winograd's F(2x2, 3x3), after Lavin
and Gray 2015 (arXiv:1509.09308), section 4.1. cuDNN has it too.

The kernel and tiles of 4x4 pixels are transformed and multiplied point by point; what comes out is
transformed to 2x2 outputs. Over all tiles and channels the products are 16 products of matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _rows_and_columns(matrix):
    return np.kron(matrix, matrix)


# The paper's B^T, G and A^T.
_KERNEL = _rows_and_columns([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = _rows_and_columns([[1, 1, 1, 0], [0, 1, -1, -1]])
_PIXELS = _rows_and_columns([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
# A tile comes as 2x2 blocks of 2x2 pixels, because its neighbours have the blocks in common.
_PIXELS = _PIXELS.reshape(16, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(16, 16)


@jax.custom_vjp
def convolution(images, kernel):
    """`[B, H, W, C]`, `[3, 3, C, O]` -> `[B, H, W, O]`: stride 1, one pixel of zeros around.

    Both gradients are computed in the same way.
    """
    batch, height, width, _ = images.shape
    kernel = _transform(_KERNEL, kernel).reshape(16, *kernel.shape[2:])
    products = jnp.einsum("tnc,tco->tno", _tiles(images), kernel)
    h, w = (height + 1) // 2, (width + 1) // 2
    blocks = _transform(_OUTPUT, products).reshape(2, 2, batch, h, w, -1)
    joined = blocks.transpose(2, 3, 0, 4, 1, 5).reshape(batch, 2 * h, 2 * w, -1)
    return joined[:, :height, :width]


def _forward(images, kernel):
    return convolution(images, kernel), (images, kernel)


def _backward(saved, gradient):
    images, kernel = saved
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return convolution(gradient, turned), _kernel_gradient(images, gradient)


convolution.defvjp(_forward, _backward)


def _kernel_gradient(images, gradient):
    outputs = _transform(_OUTPUT.T, _blocks(gradient, around=0))
    outputs = outputs.reshape(16, -1, gradient.shape[-1])
    products = jnp.einsum("tnc,tno->tco", _tiles(images), outputs)
    return _transform(_KERNEL.T, products).reshape(3, 3, *products.shape[1:])


def _tiles(images):
    """`[B, H, W, C]` -> `[16, tiles, C]`, transformed."""
    blocks = _blocks(images, around=1)
    h, w = blocks.shape[3] - 1, blocks.shape[4] - 1
    tiles = jnp.stack([blocks[:, :, :, i : h + i, j : w + j] for i in (0, 1) for j in (0, 1)])
    return _transform(_PIXELS, tiles).reshape(16, -1, images.shape[-1])


def _blocks(images, around):
    """`[2, 2, B, h, w, C]`, with zeros around and, of an odd number, after the last pixels."""
    batch, height, width, channels = images.shape
    sides = [(around, around + size % 2) for size in (height, width)]
    images = jnp.pad(images, ((0, 0), *sides, (0, 0)))
    images = images.reshape(batch, images.shape[1] // 2, 2, images.shape[2] // 2, 2, channels)
    return images.transpose(2, 4, 0, 1, 3, 5)


def _transform(matrix, x):
    """The product with `x`, whose first axes together are as long as a row of the matrix."""
    return jnp.asarray(matrix, x.dtype) @ x.reshape(matrix.shape[1], -1)
