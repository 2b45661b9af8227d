"""Sums over pixels, in pairs on a CPU, where XLA's own loop adds one number at a time.

README.md says what they are worth.
"""

from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax


def library_sum(x):
    """`[B, ..., C]` -> `[B, C]`, in the order that the compiler chooses."""
    return x.sum(tuple(range(1, x.ndim - 1)))


@jax.jit  # traced and lowered once a shape
def sum_of_pixels(x):
    """`[B, ..., C]` -> `[B, C]`, without a gradient.

    In a program for a CPU whole rows are added in pairs, which loses fewer digits too.
    """
    return lax.platform_dependent(x, cpu=_sum_in_pairs, default=library_sum)


def _sum_in_pairs(x):
    return _in_pairs(x.reshape(x.shape[0], -1, x.shape[-1]))


def _in_pairs(x):
    """`[B, N, C]` -> `[B, C]`: the first half onto the second, and again.

    Two halvings at once: one at a time XLA writes the first of them to memory inside a network.
    """
    quarter = x.shape[1] // 4
    sums = [x[:, i] for i in range(4 * quarter, x.shape[1])]
    if quarter:
        a, b, c, d = (x[:, i * quarter : (i + 1) * quarter] for i in range(4))
        sums.append(_in_pairs((a + c) + (b + d)))
    return reduce(jnp.add, sums)
