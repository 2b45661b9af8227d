"""The orders of axes in which an activation of PyTorch may lie in JAX."""

import itertools
from typing import NamedTuple

import numpy as np
import torch

LARGEST = 1e3
"""The relative error of arrays of different shapes, or of values that are not finite."""


def nchw(images: np.ndarray) -> torch.Tensor:
    """Images `[B, H, W, C]` as PyTorch's `[B, C, H, W]`.

    With one channel, `permute` and `contiguous` copy nothing and keep strides that PyTorch takes
    for those of another memory format.
    """
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy(order="C"))


class Layout(NamedTuple):
    """The order of axes in which an activation of PyTorch lies in JAX."""

    shape: tuple[int, ...]
    """PyTorch's."""

    split: tuple[int, ...]
    """PyTorch's shape, or the same with an axis split in two."""

    axes: tuple[int, ...]
    """The axes of `split` in JAX's order."""

    @property
    def permuted(self) -> tuple[int, ...]:
        """The shape in JAX's order, before a reshape to JAX's shape."""
        return tuple(self.split[a] for a in self.axes)

    def to_torch(self, array) -> torch.Tensor:
        """An activation of JAX in PyTorch's layout."""
        array = np.asarray(array)
        if array.size == np.prod(self.shape):
            array = array.reshape(self.permuted).transpose(np.argsort(self.axes))
            array = array.reshape(self.shape)
        elif array.ndim == len(self.axes):  # of other sizes; of other axes it stays as it is
            array = array.transpose(np.argsort(self.axes))
        return torch.from_numpy(np.array(array, order="C"))

    def to_jax(self, array, shape) -> np.ndarray:
        """An activation of PyTorch in JAX's layout."""
        return array.reshape(self.split).transpose(self.axes).reshape(shape)


def closest(expected: torch.Tensor, got) -> tuple[float, Layout]:
    """The layout in which an array of JAX is most like PyTorch's, with its relative error."""
    expected, got = expected.detach().numpy(), np.asarray(got)
    found = [(error_in(way, expected, got), way) for way in layouts(expected.shape, got.shape)]
    return min(found, key=lambda pair: pair[0])


def layouts(standard: tuple[int, ...], subject: tuple[int, ...]) -> list[Layout]:
    """Ways in which PyTorch's axes may lie in JAX's shape."""
    own = _orders(standard, standard)
    if exact := [way for way in own if _same(way.permuted, subject)]:
        return exact
    split = [way for shape in _splits(standard, subject) for way in _orders(standard, shape)]
    found = [way for way in own if _joined(way.permuted, subject)]
    found += [way for way in split if _same(way.permuted, subject)]
    return found or [_usual(standard, subject)]


def _orders(standard, shape) -> list[Layout]:
    return [Layout(standard, shape, a) for a in itertools.permutations(range(len(shape)))]


def _splits(standard, subject) -> list[tuple[int, ...]]:
    """The shapes with one axis split into two of JAX's."""
    return [
        (*standard[:axis], first, second, *standard[axis + 1 :])
        for axis, size in enumerate(standard)
        for first, second in itertools.permutations(subject, 2)
        if first * second == size and first > 1 and second > 1
    ]


def _same(permuted, subject) -> bool:
    return without_ones(permuted) == without_ones(subject)


def _joined(permuted, subject) -> bool:
    """True if the axes of one shape are neighbouring axes of the other, joined."""
    first, second = (set(np.cumprod(without_ones(shape))) for shape in (permuted, subject))
    return np.prod(permuted) == np.prod(subject) and (first <= second or second <= first)


def _usual(standard, subject) -> Layout:
    """Channels last or first, for another number of pixels."""
    last = (0, *range(2, len(standard)), 1)[: len(standard)]
    ways = [Layout(standard, standard, axes) for axes in (last, tuple(range(len(standard))))]
    pairs = [sum(a == b for a, b in zip(w.permuted, subject, strict=False)) for w in ways]
    return ways[pairs.index(max(pairs))]


def without_ones(shape):
    return tuple(n for n in shape if n != 1)


def error_in(layout: Layout, expected: np.ndarray, got: np.ndarray) -> float:
    """Norm of the difference in a layout over the norm of PyTorch's activation."""
    if got.size != expected.size:
        return LARGEST
    moved = layout.to_jax(expected, got.shape)
    difference = float(np.linalg.norm(got - moved))
    error = difference / max(float(np.linalg.norm(moved)), 1e-300)
    return error if np.isfinite(error) else LARGEST
