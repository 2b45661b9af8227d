"""Sums over pixels for XLA's CPU backend, whose own loop adds one number at a time.

BatchNorm in training, forward and gradient, one core, jaxlib 0.10.2, milliseconds:

| `[B, H, W, C]`      | `x.sum((1, 2))` | here |
|---------------------|-----------------|------|
| `[32, 32, 32, 64]`  | 18.4            | 2.8  |
| `[32, 16, 16, 128]` | 7.9             | 1.4  |
| `[32, 8, 8, 256]`   | 4.9             | 0.3  |
| `[32, 4, 4, 512]`   | 3.2             | 0.2  |
| `[16, 56, 56, 64]`  | 23.5            | 7.7  |
| `[16, 7, 7, 2048]`  | 33.9            | 3.5  |

A jaxlib whose reductions use vector instructions inside a fusion retires the file.
"""

from functools import partial

import jax


def sum_of_pixels(x):
    """`[B, ..., C]` -> `[B, C]`, in pairs on a CPU: whole rows added, fewer digits lost."""
    if jax.default_backend() != "cpu":
        return x.sum(tuple(range(1, x.ndim - 1)))
    return _in_pairs(x.reshape(x.shape[0], -1, x.shape[-1]))


@partial(jax.jit, inline=True)
def _in_pairs(x):
    """`[B, N, C]` -> `[B, C]`: the first half onto the second, and again.

    A jit for its cache: Python traces a shape once, not at every layer.
    """
    if x.shape[1] == 1:
        return x[:, 0]
    half, odd = divmod(x.shape[1], 2)
    total = _in_pairs(x[:, :half] + x[:, half : 2 * half])
    return total + x[:, -1] if odd else total
