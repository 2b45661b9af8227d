"""Numbers of narrow types as their authors wrote them."""

import jax.numpy as jnp
import numpy as np

NARROW = (jnp.float16, jnp.bfloat16, jnp.float32)

MOST = 10_000
"""Elements of an array whose decimals are looked for: constants, not tables."""

EPS = float(np.finfo(np.float32).eps)
"""The eps of float32, which an author means by the eps of an activation's type. Here that type is
float64."""


def lifted(array):
    """A narrow float array as float64; numbers as their author wrote them (0.9, root of 1/2)."""
    if jnp.result_type(array) not in NARROW:
        number = np.ndim(array) == 0 and jnp.result_type(array) == np.float64
        return EPS if number and array == np.finfo(np.float64).eps else array
    array = np.asarray(array)
    if array.dtype != np.float32:  # an array of its own has the numbers that it holds
        return _of_few_digits(array) if array.ndim == 0 else array.astype(np.float64)
    return _as_written(array) if array.ndim == 0 else _decimals(array)


USUAL = (np.sqrt(2 / np.pi), np.sqrt(0.5), np.sqrt(2), 0.044715, 1.702, 1 / 6, 1 / 3)
"""Numbers of activations that have more digits than bfloat16 and float16 hold."""


def _of_few_digits(number: np.ndarray) -> np.float64:
    """The usual number, or the shortest decimal, that float16 or bfloat16 rounded to a number."""
    decimals = (float(f"{number:.{digits}g}") for digits in (1, 2, 3, 4))
    tries = (*(np.copysign(usual, float(number)) for usual in USUAL), *decimals)
    kind = number.dtype.type
    return np.float64(next((n for n in tries if kind(n) == number), float(number)))


def _decimals(array: np.ndarray) -> np.ndarray:
    """Decimals of up to six digits in place of the float32 that are nearest to them."""
    wide = array.astype(np.float64)
    if array.size > MOST:
        return wide
    short = np.array([float(f"{number:.6g}") for number in array.reshape(-1)]).reshape(array.shape)
    return np.where(short.astype(np.float32) == array, short, wide)


def _as_written(number: np.ndarray) -> np.float64:
    """The decimal, or the root of a decimal or of 2 / pi, that float32 rounded to a number."""
    decimal = np.float64(str(number))
    if number == np.float32(f"{number:.6g}") or not 1e-6 < abs(number) < 1e6:
        return decimal
    square = np.square(decimal)
    inside = (np.float64(f"{square:.6g}"), 1 / np.float64(f"{1 / square:.6g}"), 2 / np.pi)
    roots = (np.copysign(np.sqrt(value), decimal) for value in inside)
    return next((root for root in roots if np.float32(root) == number), decimal)
