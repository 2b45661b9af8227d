"""The arrays of both sides that an explanation of a divergence may look at."""

from collections.abc import Iterator

import numpy as np

from equivalence_tests.parity.engine import Row, Trace
from equivalence_tests.parity.inputs import Case

SAME = 1e-9
"""Largest relative difference between a predicted array and an equal one: far above rounding, far
below every fault."""


def module_of(row: Row) -> str:
    """Name of the layer that a tensor belongs to."""
    name = row.name.split(" ")[0].split(":")[0]
    if row.phase == "forward":
        return name
    return name.rpartition(".")[0]


class Evidence:
    """Evidence available to an explanation."""

    def __init__(self, row: Row, subject: Trace, standard: Trace, case: Case):
        self.row, self.subject, self.standard, self.case = row, subject, standard, case
        self.module = module_of(row)
        self.got = np.asarray(subject[row.phase][row.name], np.float64)
        self.expected = np.asarray(standard[row.phase][row.name], np.float64)

    def weights(self, leaf: str) -> np.ndarray:
        """An array of the module's state before the step."""
        return np.asarray(self.case.arrays[f"{self.module}.{leaf}"], np.float64)

    def statistic(self, leaf: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A running statistic of the module: before the step, in subject, in standard."""
        name = f"{self.module}.{leaf}"
        sources = self.case.arrays, self.subject["batch_norm"], self.standard["batch_norm"]
        before, got, expected = (np.asarray(source[name], np.float64) for source in sources)
        return before, got, expected

    def has(self, prediction) -> bool:
        """True if the subject's array equals the prediction."""
        return same(prediction, self.got)

    def inputs(self) -> Iterator[np.ndarray]:
        """Candidates for the module's input: earlier activations [B, C, H, W], nearest first, each
        without and with a ReLU; then the images."""
        names = list(self.standard["forward"])
        for name in reversed(names[: names.index(self.row.name)]):
            activation = np.array(self.standard["forward"][name])  # JAX's arrays are read-only
            yield from (activation, np.maximum(activation, 0))
        yield self.case.images[-1].transpose(0, 3, 1, 2).astype(np.float64)


def same(a, b) -> bool:
    """True if two arrays are equal up to rounding."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and np.linalg.norm(a - b) <= SAME * np.linalg.norm(b)


def constant(values, spread=1e-6, noise=0.0) -> float | None:
    """The value of an array whose elements are all equal, or None.

    Args:
      spread: relative differences to ignore.
      noise: absolute differences to ignore, for a value that may be 0.
    """
    values = np.asarray(values, np.float64)
    middle = float(np.median(values))
    return middle if np.abs(values - middle).max() <= spread * abs(middle) + noise else None
