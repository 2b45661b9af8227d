"""The one comparison engine: numbers of both frameworks, side by side.

    run_torch(case), run_jax(case) -> Trace       compare(got, reference) -> [Row, ...]

A `Trace` holds plain arrays under torch's names and in torch's layouts, so whoever compares them
cannot know which framework, or which fault, they come from. What runs is what trains: the train
steps of `torch_ref.steps` and `flax_resnet.training.steps`, with probes in them.
"""

from typing import NamedTuple

import jax
import numpy as np

from equivalence_tests.parity import jax_side, torch_side
from equivalence_tests.parity.inputs import Case

Trace = dict[str, dict[str, np.ndarray]]
"""phase -> name -> array. The names of a phase are in the order in which they are computed."""

PHASES = ("forward", "loss", "gradient", "batch_norm", "optimizer", "parameters")
"""In the order in which a step computes them; forward, loss and gradient are the last step's."""


def run_torch(
    case: Case, dtype=np.float64, *, train=True, decisions=None, record=None, model=None
) -> Trace:
    """All steps of a case in PyTorch, or its forward and backward pass in evaluation mode.

    Args:
      model: another network than the twin, with its own weights.
      decisions: of every step, to replay (`replay.py`).
      record: a list to which the decisions of every step are appended.
    """
    return torch_side.run(case, dtype, train=train, decisions=decisions, record=record, model=model)


def run_jax(
    case: Case, dtype=np.float64, *, train=True, decisions=None, jit=False, edit=None
) -> Trace:
    """The same in JAX.

    Args:
      edit: called with the model before the first step, to change it in place.
      jit: compile the whole step: half the time for one network. Op by op, all networks that
        follow in the same process share what is compiled.
    """
    with jax.enable_x64(dtype == np.float64):
        return jax_side.run(case, dtype, train=train, decisions=decisions, jit=jit, edit=edit)


class Row(NamedTuple):
    """One tensor of both sides."""

    phase: str

    name: str

    shape: tuple[int, ...]

    max_relative: float
    """Largest difference over the largest value; infinite where the shapes differ."""

    norm_relative: float
    """Norm of the difference over the norm of the reference."""

    ulp: float
    """Largest difference in units of the last place of the reference's largest value."""


def compare(got: Trace, reference: Trace) -> list[Row]:
    """All tensors in the order in which a step computes them.

    Raises:
      ValueError: a side has tensors that the other lacks. Activations may have more names in the
        reference, which has modules where JAX has functions.
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
    return Row(
        phase,
        name,
        reference.shape,
        _ratio(largest, size),
        _ratio(np.linalg.norm(difference), np.linalg.norm(np.asarray(reference, np.float64))),
        float(largest / ulp),
    )


def _largest(array):
    """The largest absolute value, in the array's type; NaN if there is one."""
    return abs(np.maximum(array.max(), -array.min()))


def _ratio(error, size) -> float:
    if not np.isfinite(error):
        return float("inf")
    return float(error / size) if size else float("inf" if error else 0)


class Budget(NamedTuple):
    """The error of one tensor in a narrow type, and what it may be; both against float64."""

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
    """Whether `got` is about as close to the truth as the reference is.

    Args:
      got, reference: in the narrow type.
      truth: the reference in float64.
      factor: how much larger the error may be.
      ulps: what is granted beyond, in relative units of the narrow type.
    """
    rows = zip(compare(got, truth), compare(shared(reference, got), truth), strict=True)
    return [
        Budget(a.phase, a.name, a.norm_relative, b.norm_relative, factor, ulps) for a, b in rows
    ]


def pooled(rows: list[Budget]) -> Budget:
    """One tensor over several batches, its errors as root mean squares."""

    def rms(values):
        return float(np.sqrt(np.mean(np.square(list(values)))))

    return rows[0]._replace(
        error=rms(row.error for row in rows),
        reference_error=rms(row.reference_error for row in rows),
    )


def shared(trace: Trace, other: Trace) -> Trace:
    """What both have, of the first, in the order of the second."""
    return {
        phase: {n: arrays[n] for n in other[phase] if n in arrays}
        for phase, arrays in trace.items()
        if phase in other
    }


def worst(rows: list[Row], *phases) -> Row:
    """The row of these phases with the largest norm-wise error."""
    return max((r for r in rows if r.phase in phases), key=lambda row: row.norm_relative)
