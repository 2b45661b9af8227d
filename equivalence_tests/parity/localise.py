"""The localiser: finds the first phase and module in which two traces diverge, and a likely cause.

It reads arrays only: the traces of both sides and the case that both ran on.
"""

from typing import Literal, NamedTuple

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.causes import causes
from equivalence_tests.parity.causes.evidence import module_of
from equivalence_tests.parity.engine import Row, Trace, compare
from equivalence_tests.parity.inputs import Case

Verdict = Literal["equal", "rounding", "semantic"]


def verdict(row: Row, arch: str) -> Verdict:
    """Classifies the difference of one tensor in float64.

    "semantic" is a difference of definition, larger than rounding can explain.
    """
    if row.norm_relative == 0:
        return "equal"
    within = row.norm_relative <= tolerances.float64(arch, row.phase)
    return "rounding" if within else "semantic"


class Finding(NamedTuple):
    """The first divergence."""

    phase: str

    module: str
    """Torch's name of the layer; "" for a tensor without one (a loss, a step count)."""

    row: Row

    causes: list[str]
    """Known faults that explain the divergence, one sentence each; [] if none does."""


def first_divergence(subject: Trace, standard: Trace, case: Case) -> Finding | None:
    """The first tensor, in the order of a step, whose difference rounding cannot explain.

    Args:
      subject: the side that may be wrong.
      standard: the side that follows PyTorch's definitions.
      case: weights and images that both sides ran on.

    Returns:
      The finding; None if every difference is rounding.
    """
    rows = compare(subject, standard)
    row = next((row for row in rows if verdict(row, case.arch) == "semantic"), None)
    if row is None:
        return None
    return Finding(row.phase, module_of(row), row, causes(row, subject, standard, case))
