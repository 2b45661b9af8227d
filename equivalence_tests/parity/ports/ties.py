"""A ReLU of JAX that is a maximum with 0, and so has another derivative at exactly 0."""

import numpy as np

from equivalence_tests.parity.ports.graph import Graph, Operation

RELUS = {"relu", "relu6", "hardtanh"}
"""Operations of PyTorch that pass no gradient at 0."""


def remarks(standard: Graph, subject: Graph) -> list[str]:
    """A sentence on the maxima with 0 in JAX's network, if PyTorch's has a ReLU.

    Random numbers are never exactly 0, so the gradients themselves do not show it.
    """
    relus = [i for i in standard.needed([standard.logits]) if standard.operations[i].name in RELUS]
    count = len(_halving(subject)) if relus else 0
    if not count:
        return []
    which = "a maximum with 0, which passes" if count == 1 else f"{count} maxima with 0, which pass"
    return [
        f"JAX's network has {which} half of the gradient where the other number is exactly 0;"
        " PyTorch's ReLU passes none there, and neither does jax.nn.relu"
    ]


def _halving(graph: Graph) -> list[Operation]:
    """The maxima of a value and a constant 0 whose derivative is JAX's own."""
    data, needed = graph.data(), [graph.operations[i] for i in graph.needed([graph.logits])]
    return [
        operation
        for operation in needed
        if operation.name == "max" and not operation.options["ruled"]
        for x, bound in (operation.inputs, operation.inputs[::-1])
        if x in data and _is_zero(graph, bound, data)
    ]


def _is_zero(graph: Graph, value: int, data: set[int]) -> bool:
    if value in data or graph.leaves_above(value):
        return False
    return not np.any(graph.evaluate({}, graph.needed([value]))[value])
