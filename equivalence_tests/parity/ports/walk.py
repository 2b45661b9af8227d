"""Runs both networks side by side, each layer of PyTorch on what reaches the same layer in JAX.

After every layer that both have, an anchor, PyTorch goes on from JAX's activation. So a layer that
differs is seen by itself: differences above it do not reach it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from equivalence_tests.parity.ports import draws
from equivalence_tests.parity.ports.graph import Graph, Value
from equivalence_tests.parity.ports.layouts import Layout, closest, nchw, without_ones
from flax_resnet.errors import InputError


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

    drawn: draws.Place


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
        self.of_torch[standard.images] = nchw(images)
        self.of_jax = {subject.images: jnp.asarray(images)}
        self._data = subject.data()
        self.steps: list[Step] = []
        self.draws = draws.Draws(standard, subject)

    def in_jax(self, value: Value, leaves=None):
        """A value of JAX; with other leaves than the walk's, nothing is kept.

        What is computed from leaves alone is never kept: parts of a leaf may be filled later.
        """
        known = self.of_jax if leaves is None else dict(self.of_jax)
        indices = self.subject.needed([value], known)
        current = self.leaves if leaves is None else leaves
        arrays = {v: current[n] for n, v in self.subject.leaves.items()}
        found = self.subject.evaluate(arrays | known, indices)
        computed = {v for i in indices for v in self.subject.operations[i].outputs}
        if leaves is None:
            self.of_jax.update({v: found[v] for v in computed & self._data})
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
        ours = self.subject.needed([subject], self.of_jax)
        got = self.in_jax(subject)
        drawn = self.draws.share(operations, ours, lambda: closest(self.in_torch(standard), got)[0])
        expected = self.in_torch(standard)
        if len(without_ones(np.shape(got))) < 2 < expected.ndim:
            subject = self._applied(subject, expected.numel())
            got = self.in_jax(subject)
        for side, array in ("PyTorch", expected.numpy()), ("JAX", got):
            if not np.isfinite(array).all():
                where = self.standard.operations[operations[-1]].module if operations else "the end"
                raise InputError(f"the activation of {side} at {where} is not finite")
        error, layout = closest(expected, got)
        step = Step(standard, subject, layout, error, operations,
                    (tuple(expected.shape), tuple(np.shape(got))), drawn)  # fmt: skip
        fits = np.size(got) == expected.numel() or np.ndim(got) == expected.ndim
        self.of_torch[standard] = layout.to_torch(got) if fits else expected
        self.of_jax[subject] = got  # not kept yet where the images do not lead to it
        self.steps.append(step)
        return step
