"""Sums over pixels for XLA's CPU backend, whose own loop adds one number at a time.

BatchNorm in training, forward and gradient, medians of 9 calls in turns, in ms; one core of an AMD
EPYC with another job on the other, jaxlib 0.10.2. "in halves" halves once at a time:

| `[B, H, W, C]`       | `x.sum((1, 2))` | in halves       | here  |
|----------------------|-----------------|-----------------|-------|
| `[32, 32, 32, 64]`   | 22.1            | 11.5            | 11.3  |
| `[32, 16, 16, 128]`  | 6.1             | 2.4             | 2.2   |
| `[32, 8, 8, 256]`    | 3.1             | 0.8             | 0.6   |
| `[32, 4, 4, 512]`    | 0.6             | 0.3             | 0.4   |
| `[16, 56, 56, 64]`   | 35.7            | 22.8            | 17.5  |
| `[16, 112, 112, 64]` | 176.8           | 180.5           | 123.1 |
| `[16, 56, 56, 256]`  | 193.6           | 112.9           | 90.3  |
| `[16, 7, 7, 2048]`   | 30.9            | 5.2             | 7.3   |

A jaxlib whose reductions use vector instructions inside a fusion retires the file.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp


def sum_of_pixels(x):
    """`[B, ..., C]` -> `[B, C]`, in pairs on a CPU: whole rows added, fewer digits lost."""
    if jax.default_backend() != "cpu":
        return x.sum(tuple(range(1, x.ndim - 1)))
    return _in_pairs(x.reshape(x.shape[0], -1, x.shape[-1]))


@partial(jax.jit, inline=True)
def _in_pairs(x):
    """`[B, N, C]` -> `[B, C]`: the first half onto the second, and again.

    Two halvings at once: one at a time XLA writes the first of them to memory inside a network. A
    jit for its cache: Python traces a shape once, not at every layer.
    """
    quarter = x.shape[1] // 4
    sums = [x[:, i] for i in range(4 * quarter, x.shape[1])]
    if quarter:
        a, b, c, d = (x[:, i * quarter : (i + 1) * quarter] for i in range(4))
        sums.append(_in_pairs((a + c) + (b + d)))
    return reduce(jnp.add, sums)
