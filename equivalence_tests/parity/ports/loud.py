"""Differences that only large values show: another bound of a ReLU6 or of a clip.

In evaluation both networks see the images times a factor, so that activations reach the bounds.
"""

import jax.numpy as jnp
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


def unreached(quiet: Walk, images: np.ndarray) -> list[str]:
    """Layers of either network with a bound that no value reaches, one sentence each."""
    return [*_of_torch(quiet.standard, images, quiet.state), *_of_jax(quiet, images)]


def _of_torch(graph: Graph, images: np.ndarray, state: dict) -> list[str]:
    values = {v: torch.as_tensor(state[n]) for n, v in graph.leaves.items()}
    values[graph.images] = torch.from_numpy(FACTOR * images).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        graph.evaluate(values, graph.needed([graph.logits]))
    operations = [graph.operations[i] for i in graph.needed([graph.logits])]
    return [
        f"{operation.module or operation.name} never reaches its bound of {bound:g}"
        for operation in operations
        for bound, beyond in _bounds(operation)
        if not beyond(values[operation.inputs[0]].numpy(), bound).any()
    ]


GUARD = 1e-3
"""Bounds nearer to zero than this keep a number from 0, or are a ReLU's."""


def _of_jax(quiet: Walk, images: np.ndarray) -> list[str]:
    """The bounds that are constants of JAX's network: of a minimum, a maximum or a clamp."""
    graph, data = quiet.subject, quiet.subject.data()
    values = {v: quiet.leaves[n] for n, v in graph.leaves.items()} | {
        graph.images: jnp.asarray(FACTOR * images)
    }
    needed = graph.needed([graph.logits])
    graph.evaluate(values, needed)
    found = {}
    for operation in (graph.operations[i] for i in needed):
        for x, bound, beyond in BOUNDED.get(operation.name, ()):
            x, bound = operation.inputs[x], operation.inputs[bound]
            numbers = np.asarray(values[bound])
            fixed = x in data and bound not in data and not graph.leaves_above(bound)
            if not fixed or numbers.dtype.kind != "f" or not np.isfinite(numbers).all():
                continue
            if np.abs(numbers).max() > GUARD and not beyond(values[x], numbers).any():
                found[f"JAX's network never reaches its bound of {numbers.flat[0]:g}"] = None
    return list(found)


BOUNDED = {
    "min": [(0, 1, np.greater), (1, 0, np.greater)],
    "max": [(0, 1, np.less), (1, 0, np.less)],
    "clamp": [(1, 0, np.less), (1, 2, np.greater)],
}
"""{operation: (position of a number, position of its bound, what is cut off)}."""


def _bounds(operation) -> list[tuple]:
    """The numbers at which an operation of PyTorch cuts its input off, and what is cut off."""
    if operation.name == "relu6":
        return [(6.0, np.greater)]
    if operation.name not in ("hardtanh", "clamp", "clip", "clamp_min", "clamp_max"):
        return []
    names = {"clamp_min": "low", "clamp_max": "high"}.get(operation.name, "low high")
    given = variant.arguments(operation, names)
    found = [(given.get("low"), np.less), (given.get("high"), np.greater)]
    return [(b, f) for b, f in found if isinstance(b, int | float) and GUARD < abs(b) < np.inf]
