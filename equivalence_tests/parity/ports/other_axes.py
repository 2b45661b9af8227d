"""BatchNorms of JAX whose parameters and statistics belong to another axis than the channels."""

from equivalence_tests.parity.ports import exported
from equivalence_tests.parity.ports.faults import Fault, last
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.mapping import Mapping
from equivalence_tests.parity.ports.walk import Walk


def named(found: list[Fault], walk: Walk, mapping: Mapping) -> list[Fault]:
    """The faults, with one for each such BatchNorm in place of what follows from it."""
    own, consequences, behind = [], set(), set()
    for index, operation in enumerate(walk.standard.operations):
        reason, leaves = _reason(walk, operation, mapping)
        if reason:
            own.append(Fault(operation.module, "evaluation", "forward", 1.0, [reason]))
            consequences |= {operation.module, *leaves}
            steps = [step for step in walk.steps if index in step.operations]
            behind |= {last(walk.standard.operations, step) for step in steps}
    others = [f for f in found if f.module not in consequences]
    return own + [f for f in others if f.causes or f.module not in behind]


def _reason(walk: Walk, operation: Operation, mapping: Mapping) -> tuple[str, list[str]]:
    """The sentence about a BatchNorm and JAX's leaves; "" if it is one of the channels."""
    names = [n for n, v in walk.standard.leaves.items() if v in operation.inputs]
    if operation.name != exported.BATCH_NORM or not mapping.unplaced.keys() >= set(names):
        return "", []
    shape = walk.in_torch(operation.inputs[0]).shape
    for axis, count in zip("HW", shape[2:], strict=False):
        leaves = [path for path, size in mapping.extra.items() if size == (count,)]
        if count != shape[1] and len(leaves) >= len(names) > 0:
            reason = f"BatchNorm has a scale and statistics for each of {count} positions along"
            return f"{reason} {axis} instead of {shape[1]} channels", leaves
    return "", []
