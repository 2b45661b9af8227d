"""Likely causes of a first divergence.

For each known fault, the faulty result is computed from arrays that are still equal on both sides.
A fault is a cause if its result equals what the faulty side has.
"""

from collections.abc import Callable

from equivalence_tests.parity.causes import in_layers, in_optimizers, in_statistics
from equivalence_tests.parity.causes.evidence import Evidence
from equivalence_tests.parity.engine import Row, Trace
from equivalence_tests.parity.inputs import Case

EXPLANATIONS: dict[str, tuple[Callable[[Evidence], list[str]], ...]] = {
    "forward": (in_layers.other_epsilon, in_layers.other_convolution, in_layers.other_pool),
    "loss": (in_layers.other_loss,),
    "gradient": (in_layers.ties_at_zero,),
    "batch_norm": (in_statistics.moved_by, in_statistics.not_counted),
    "optimizer": (
        in_optimizers.other_momentum,
        in_optimizers.other_average,
        in_optimizers.other_direction,
    ),
    "parameters": (in_optimizers.other_sgd_step, in_optimizers.other_adam_step),
}
"""Explanations by the phase of the first divergence."""


def causes(row: Row, subject: Trace, standard: Trace, case: Case) -> list[str]:
    """Known faults that predict the subject's array, one sentence each."""
    evidence = Evidence(row, subject, standard, case)
    found = []
    for explain in EXPLANATIONS.get(row.phase, ()):
        try:
            found += explain(evidence)
        except (KeyError, RuntimeError, StopIteration, ValueError):
            continue  # this fault does not apply to such arrays
    return found
