"""A max-pool whose windows are slices of the image, on every platform.

The gradient of XLA's own window is slow on a CPU, and its GPU compiler refuses it where a program
has to be deterministic. README.md says what this is worth.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x, window, stride, padding):
    """`[B, H, W, C]` -> `[B, H', W', C]`. Of equal numbers the first takes the gradient."""
    return reduce(jnp.maximum, _window_pixels(x, window, stride, padding))


def _forward(x, window, stride, padding):
    highest = max_pool(x, window, stride, padding)
    return highest, (x, highest)


def _backward(window, stride, padding, saved, gradient):
    x, highest = saved
    pixels, to_image = jax.vjp(lambda x: _window_pixels(x, window, stride, padding), x)
    free, gradients = jnp.ones(highest.shape, bool), []
    for pixel in pixels:
        hit = free & (pixel == highest)
        free &= ~hit
        gradients.append(jnp.where(hit, gradient, 0))
    return to_image(gradients)


max_pool.defvjp(_forward, _backward)


def _window_pixels(x, window, stride, padding):
    """`[B, H, W, C]` -> window^2 times `[B, H', W', C]`, in the order of reading."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = jnp.pad(x, around, constant_values=-jnp.inf)
    rows, columns = ((size - window) // stride * stride + 1 for size in x.shape[1:3])
    return [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(window)
        for j in range(window)
    ]
