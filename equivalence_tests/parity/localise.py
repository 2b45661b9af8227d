"""Where two traces part, and why: first the phase and the module, then the likely cause.

Only arrays are looked at: the traces of both sides and the case they ran on.
"""

from typing import Literal, NamedTuple

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.causes import causes, module_of
from equivalence_tests.parity.engine import Row, Trace, compare
from equivalence_tests.parity.inputs import Case

Verdict = Literal["equal", "rounding", "semantic"]


def verdict(row: Row, arch: str) -> Verdict:
    """Of one tensor in float64."""
    if row.norm_relative == 0:
        return "equal"
    within = row.norm_relative <= tolerances.float64(arch, row.phase)
    return "rounding" if within else "semantic"


class Finding(NamedTuple):
    """The first divergence."""

    phase: str

    module: str
    """Torch's name of the layer; "" for the whole (a loss, a step count)."""

    row: Row

    causes: list[str]
    """Faults that explain it, each one sentence; [] for none that is known."""


def first_divergence(subject: Trace, standard: Trace, case: Case) -> Finding | None:
    """The first tensor, in the order of a step, that rounding cannot explain.

    Args:
      subject: the side that may be wrong.
      standard: the side that follows PyTorch's definitions.
      case: what both ran on.
    """
    rows = compare(subject, standard)
    row = next((row for row in rows if verdict(row, case.arch) == "semantic"), None)
    if row is None:
        return None
    return Finding(row.phase, module_of(row), row, causes(row, subject, standard, case))
