"""Runs both networks side by side, each layer of PyTorch on what reaches the same layer in JAX.

After every layer that both have, an anchor, PyTorch goes on from JAX's activation. So a layer that
differs is seen by itself: differences above it do not reach it.
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from equivalence_tests.parity.ports.graph import Graph, Value
from flax_resnet.errors import InputError

LARGEST = 1e3
"""The relative error of arrays of different shapes, or of values that are not finite."""


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
        else:
            array = array.transpose(np.argsort(self.axes))
        return torch.from_numpy(np.array(array, order="C"))

    def to_jax(self, array, shape) -> np.ndarray:
        """An activation of PyTorch in JAX's layout."""
        return array.reshape(self.split).transpose(self.axes).reshape(shape)


class Step(NamedTuple):
    """One anchor: the same activation on both sides, from the same inputs."""

    standard: Value
    """Its value in PyTorch's graph."""

    subject: Value
    """Its value in JAX's graph."""

    layout: Layout

    error: float
    """Norm of the difference over the norm of PyTorch's activation."""

    operations: tuple[int, ...]
    """PyTorch's operations since the anchors above."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """PyTorch's and JAX's."""


class Walk:
    """One pass through both networks, anchor by anchor."""

    def __init__(self, standard: Graph, subject: Graph, state: dict, leaves: dict, images):
        """Begins at the images.

        Args:
          state: PyTorch's parameters and statistics by name.
          leaves: JAX's by path; may be changed before an operation that needs them is computed.
          images: `[B, H, W, C]`.
        """
        self.standard, self.subject, self.leaves = standard, subject, leaves
        self.state = state
        self.of_torch = {v: torch.as_tensor(state[n]) for n, v in standard.leaves.items()}
        self.of_torch[standard.images] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.of_jax = {subject.images: jnp.asarray(images)}
        self._data = subject.data()
        self.steps: list[Step] = []

    def in_jax(self, value: Value, leaves=None):
        """A value of JAX; with other leaves than the walk's, nothing is kept.

        What is computed from leaves alone is never kept: parts of a leaf may be filled later.
        """
        known = self.of_jax if leaves is None else dict(self.of_jax)
        indices = self.subject.needed([value], known)
        current = self.leaves if leaves is None else leaves
        arrays = {v: current[n] for n, v in self.subject.leaves.items()}
        found = self.subject.evaluate(arrays | known, indices)
        self_values = {v for i in indices for v in self.subject.operations[i].outputs}
        if leaves is None:
            self.of_jax.update({v: found[v] for v in self_values & self._data})
        return found[value]

    def in_torch(self, value: Value, replaced=None) -> torch.Tensor:
        """A value of PyTorch, computed from the anchors above it, or from the images.

        The images are taken where the shapes of JAX's anchors do not fit.
        """
        start = (*self.standard.leaves.values(), self.standard.images)
        try:
            return self._evaluated(value, self.of_torch, replaced)
        except (RuntimeError, ValueError):
            return self._evaluated(value, {v: self.of_torch[v] for v in start}, replaced)

    def _evaluated(self, value: Value, known: dict, replaced=None) -> torch.Tensor:
        with torch.no_grad():
            indices = self.standard.needed([value], known)
            return self.standard.evaluate(dict(known), indices, replaced)[value]

    def _applied(self, vector: Value, size: int) -> Value:
        """The first value of this size that a vector of a batch's statistics leads to.

        Keras multiplies such statistics by BatchNorm's parameters before it applies them.
        """
        reached = {vector}
        for index in self.subject.needed([self.subject.logits]):
            operation = self.subject.operations[index]
            if reached & set(operation.inputs):
                reached.update(operation.outputs)
                if np.size(self.in_jax(operation.outputs[0])) == size:
                    return operation.outputs[0]
        return vector

    def anchor(self, standard: Value, subject: Value) -> Step:
        """Compares an activation that both have; PyTorch goes on from JAX's."""
        operations = tuple(self.standard.needed([standard], self.of_torch))
        got, expected = self.in_jax(subject), self.in_torch(standard)
        if len(_without_ones(np.shape(got))) < 2 < expected.ndim:
            subject = self._applied(subject, expected.numel())
            got = self.in_jax(subject)
        for side, array in ("PyTorch", expected.numpy()), ("JAX", got):
            if not np.isfinite(array).all():
                where = self.standard.operations[operations[-1]].module if operations else "the end"
                raise InputError(f"the activation of {side} at {where} is not finite")
        error, layout = closest(expected, got)
        step = Step(standard, subject, layout, error, operations,
                    (tuple(expected.shape), tuple(np.shape(got))))  # fmt: skip
        fits = np.size(got) == expected.numel() or np.ndim(got) == expected.ndim
        self.of_torch[standard] = layout.to_torch(got) if fits else expected
        self.steps.append(step)
        return step


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
    return _without_ones(permuted) == _without_ones(subject)


def _joined(permuted, subject) -> bool:
    """True if the axes of one shape are neighbouring axes of the other, joined."""
    first, second = (set(np.cumprod(_without_ones(shape))) for shape in (permuted, subject))
    return np.prod(permuted) == np.prod(subject) and (first <= second or second <= first)


def _usual(standard, subject) -> Layout:
    """Channels last or first, for another number of pixels."""
    last = (0, *range(2, len(standard)), 1)[: len(standard)]
    ways = [Layout(standard, standard, axes) for axes in (last, tuple(range(len(standard))))]
    pairs = [sum(a == b for a, b in zip(w.permuted, subject, strict=False)) for w in ways]
    return ways[pairs.index(max(pairs))]


def _without_ones(shape):
    return tuple(n for n in shape if n != 1)


def error_in(layout: Layout, expected: np.ndarray, got: np.ndarray) -> float:
    """Norm of the difference in a layout over the norm of PyTorch's activation."""
    if got.size != expected.size:
        return LARGEST
    moved = layout.to_jax(expected, got.shape)
    difference = float(np.linalg.norm(got - moved))
    error = difference / max(float(np.linalg.norm(moved)), 1e-300)
    return error if np.isfinite(error) else LARGEST
