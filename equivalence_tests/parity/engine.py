"""The comparison engine: runs a case in both frameworks and compares every tensor.

    run_torch(case), run_jax(case) -> Trace       compare(got, reference) -> [Row, ...]

A `Trace` holds plain arrays with torch's names and layouts, so the comparison does not depend on
the framework that computed them. Both sides run their real training steps, `torch_ref.steps` and
`flax_resnet.training.steps`, with probes.
"""

from typing import NamedTuple

import jax
import numpy as np

from equivalence_tests.parity import jax_side, torch_side
from equivalence_tests.parity.inputs import Case

Trace = dict[str, dict[str, np.ndarray]]
"""phase -> name -> array. The names of a phase are in the order of computation."""

PHASES = ("forward", "loss", "gradient", "batch_norm", "optimizer", "parameters")
"""Phases in the order of a step; a trace holds forward, loss and gradient of the last step only."""


def run_torch(
    case: Case, dtype=np.float64, *, train=True, decisions=None, record=None, model=None
) -> Trace:
    """Runs all steps of a case in PyTorch, or its forward and backward pass in evaluation mode.

    Args:
      model: a network with its own weights; None: the twin, this project's PyTorch network.
      decisions: decisions of every step, to replay (`replay.py`).
      record: a list to which the decisions of every step are appended.
    """
    return torch_side.run(case, dtype, train=train, decisions=decisions, record=record, model=model)


def run_jax(
    case: Case, dtype=np.float64, *, train=True, decisions=None, jit=False, edit=None
) -> Trace:
    """Runs all steps of a case in JAX, or its forward and backward pass in evaluation mode.

    Args:
      edit: called with the model before the first step, to change it in place.
      jit: compile the whole step, which halves the time for one network. Without it, networks of
        one process share their compiled operations.
    """
    with jax.enable_x64(dtype == np.float64):
        return jax_side.run(case, dtype, train=train, decisions=decisions, jit=jit, edit=edit)


class Row(NamedTuple):
    """Differences of one tensor between the two sides."""

    phase: str

    name: str

    shape: tuple[int, ...]

    max_relative: float
    """Largest difference over the largest value; infinite if the shapes differ."""

    norm_relative: float
    """Norm of the difference over the norm of the reference."""

    ulp: float
    """Largest difference in units in the last place (ulp) of the reference's largest value."""


def compare(got: Trace, reference: Trace) -> list[Row]:
    """Rows of all tensors in the order in which a step computes them.

    Raises:
      ValueError: a side has tensors that the other lacks. The reference may have more activations,
        because some of torch's modules are functions in JAX.
    """
    if odd := set(got) ^ set(reference):
        raise ValueError(f"phases of one side only: {', '.join(sorted(odd))}")
    rows = []
    for phase in filter(reference.__contains__, PHASES):
        names = [n for n in reference[phase] if phase != "forward" or n in got[phase]]
        if odd := set(names) ^ set(got[phase]):
            raise ValueError(f"{phase} of one side only: {', '.join(sorted(odd))}")
        rows += [_row(phase, n, got[phase][n], reference[phase][n]) for n in names]
    return rows


def _row(phase, name, got, reference) -> Row:
    if got.shape != reference.shape:
        return Row(phase, name, reference.shape, *[float("inf")] * 3)
    size = _largest(reference)
    ulp = np.spacing(size) if reference.dtype.kind == "f" else 1
    difference = np.subtract(got, reference, dtype=np.float64)
    largest = _largest(difference)
    with np.errstate(over="ignore"):  # the spacing beside a reference of 0
        ulps = float(largest / ulp)
    return Row(
        phase,
        name,
        reference.shape,
        _ratio(largest, size),
        _ratio(np.linalg.norm(difference), np.linalg.norm(np.asarray(reference, np.float64))),
        ulps,
    )


def _largest(array):
    """The largest absolute value, in the array's type; NaN if the array contains NaN."""
    return abs(np.maximum(array.max(), -array.min()))


def _ratio(error, size) -> float:
    if not np.isfinite(error):
        return float("inf")
    return float(error / size) if size else float("inf" if error else 0)


class Budget(NamedTuple):
    """Error of one tensor in float32 or bfloat16, and its bound; both measured against float64."""

    phase: str

    name: str

    error: float

    reference_error: float

    factor: float

    ulps: float

    @property
    def bound(self) -> float:
        return self.factor * self.reference_error + self.ulps

    @property
    def within(self) -> bool:
        return self.error <= self.bound


def budgets(got: Trace, reference: Trace, truth: Trace, *, factor, ulps) -> list[Budget]:
    """Errors of `got`, with bounds from the errors of the reference.

    Args:
      got, reference: traces in the narrow type (float32 or bfloat16).
      truth: the reference in float64.
      factor: factor on the error of the reference.
      ulps: allowance added to the bound, relative to the norm of the truth.
    """
    rows = zip(compare(got, truth), compare(shared(reference, got), truth), strict=True)
    return [
        Budget(a.phase, a.name, a.norm_relative, b.norm_relative, factor, ulps) for a, b in rows
    ]


def pooled(rows: list[Budget]) -> Budget:
    """Budget of one tensor over several batches, with the root mean square of its errors."""

    def rms(values):
        return float(np.sqrt(np.mean(np.square(list(values)))))

    return rows[0]._replace(
        error=rms(row.error for row in rows),
        reference_error=rms(row.reference_error for row in rows),
    )


def shared(trace: Trace, other: Trace) -> Trace:
    """The arrays of `trace` whose names `other` has too, in the order of `other`."""
    return {
        phase: {n: arrays[n] for n in other[phase] if n in arrays}
        for phase, arrays in trace.items()
        if phase in other
    }


def worst(rows: list[Row], *phases) -> Row:
    """The row of these phases with the largest norm-wise error."""
    return max((r for r in rows if r.phase in phases), key=lambda row: row.norm_relative)
