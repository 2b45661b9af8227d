"""Differences that only large values show: another bound of a ReLU6 or of a clip.

In evaluation both networks see the images times a factor, so that activations reach the bounds.
"""

import numpy as np
import torch

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports import faults, variant
from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.walk import Walk
from flax_resnet.errors import InputError

FACTOR = 16

MODE = f"evaluation, images times {FACTOR}"


def walk(quiet: Walk, images: np.ndarray) -> Walk | None:
    """The walk through the same anchors; None if an activation is not finite at such values.

    Args:
      quiet: in evaluation mode, at its end.
    """
    found = Walk(quiet.standard, quiet.subject, quiet.state, quiet.leaves, FACTOR * images)
    try:
        for step in quiet.steps:
            found.anchor(step.standard, step.subject)
    except InputError:
        return None
    return found


def forward(loud: Walk, quiet: Walk) -> tuple[list[faults.Fault], bool]:
    """Faults of anchors that agree on the images themselves, and whether each has a cause."""
    steps = [
        step
        for step, before in zip(loud.steps, quiet.steps, strict=True)
        if before.error <= tolerances.PORT and step.error > tolerances.LOUD
    ]
    found, _ = faults.forward(loud, MODE, steps)
    return found, all(fault.causes for fault in found)


def logits_agree(quiet: Walk, images: np.ndarray) -> bool:
    """True if both networks, each by itself, have the same logits at large values."""
    loud = Walk(quiet.standard, quiet.subject, quiet.state, quiet.leaves, FACTOR * images)
    got = np.asarray(loud.in_jax(loud.subject.logits))
    return tolerances.relative_error(got, loud.in_torch(loud.standard.logits)) <= tolerances.LOUD


def unreached(graph: Graph, images: np.ndarray, state: dict) -> list[str]:
    """Layers of PyTorch whose upper bound no value reaches, one sentence each."""
    values = {v: torch.as_tensor(state[n]) for n, v in graph.leaves.items()}
    values[graph.images] = torch.from_numpy(FACTOR * images).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        graph.evaluate(values, graph.needed([graph.logits]))
    return [
        f"{operation.module or operation.name} never reaches its bound of {bound:g}"
        for index in graph.needed([graph.logits])
        for operation in [graph.operations[index]]
        if (bound := _bound(operation)) is not None and values[operation.inputs[0]].max() < bound
    ]


def _bound(operation) -> float | None:
    """The number above which an operation cuts its input off; None if there is none."""
    if operation.name == "relu6":
        return 6.0
    if operation.name in ("hardtanh", "clamp", "clip"):
        bound = variant.arguments(operation, "low high").get("high")
        return bound if isinstance(bound, int | float) else None
    return None
