"""Differences that only large or only small values show.

In evaluation both networks also see the images times a factor, so that activations reach the
bounds, of a ReLU6 or a clip. If a bound is near 0, as the one that keeps a division from 0, both
also compute with their parameters times a small number.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports import faults, variant
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.mapping import Mapping, filled
from equivalence_tests.parity.ports.walk import Walk
from flax_resnet.errors import InputError

FACTOR = 16
"""Of the images, so that values reach large bounds."""

SMALL = 1e-14
"""Factor of the parameters, so that values reach small bounds, of which 1e-12 is the usual one."""

GUARD = 1e-3
"""Bounds of at most this size are small."""

LOUD = f"evaluation, images times {FACTOR}"
FAINT = f"evaluation, parameters times {SMALL:g}"


def compared(
    quiet: Walk, images: np.ndarray, mapping: Mapping, parameters: list[str]
) -> tuple[list[faults.Fault], bool, list[str]]:
    """Compares at large values, and at small ones if a bound is near 0.

    Args:
      quiet: in evaluation mode, at its end.
      images: `[B, H, W, C]`, those of `quiet`.
      parameters: names of all parameters of PyTorch's network.

    Returns:
      Faults that only such values show, whether each has a cause, and what could hide one: bounds
      that no value reaches.
    """
    walk = _with_large_images(quiet, images)
    left, hidden = _unreached(walk), []
    found, explained = [], True
    if _is_followed(walk, quiet):
        found, explained = _faults(walk, quiet, LOUD)
    else:
        hidden = [f"an activation of the images times {FACTOR} is not finite"]
    if any(abs(bound.number) <= GUARD for bound in left.values()):
        walk = _with_small_parameters(quiet, images, mapping, parameters)
        still = _unreached(walk)
        left = {place: bound for place, bound in left.items() if place in still}
        if _is_followed(walk, quiet):
            more, _ = _faults(walk, quiet, FAINT)
            found, explained = found + more, explained and not more
    sentences = (f"{b.owner} never reaches its bound of {b.number:g}" for b in left.values())
    return found, explained, [*dict.fromkeys(sentences), *hidden]


def logits_agree(quiet: Walk, images: np.ndarray) -> bool:
    """True if both networks, each by itself, have the same logits at large values."""
    walk = _with_large_images(quiet, images)
    got = np.asarray(walk.in_jax(walk.subject.logits))
    return tolerances.relative_error(got, walk.in_torch(walk.standard.logits)) <= tolerances.LOUD


def _with_large_images(quiet: Walk, images: np.ndarray) -> Walk:
    """A walk that has not begun."""
    return Walk(quiet.standard, quiet.subject, quiet.state, quiet.leaves, FACTOR * images)


def _with_small_parameters(quiet: Walk, images, mapping: Mapping, parameters: list[str]) -> Walk:
    small = {n: SMALL * quiet.state[n] for n in parameters if n in mapping.pieces}
    walk = Walk(quiet.standard, quiet.subject, quiet.state | small, quiet.leaves, images)
    walk.leaves = filled(walk, {n: mapping.pieces[n] for n in small})
    return walk


def _is_followed(walk: Walk, quiet: Walk) -> bool:
    """Leads a walk through the anchors of another; False if an activation is not finite."""
    try:
        for step in quiet.steps:
            walk.anchor(step.standard, step.subject)
    except InputError:
        return False
    return True


def _faults(walk: Walk, quiet: Walk, mode: str) -> tuple[list[faults.Fault], bool]:
    """Faults of anchors that agree on the images themselves, and whether each has a cause.

    At small values none has: the known causes change no bound near 0.
    """
    steps = [
        step
        for step, before in zip(walk.steps, quiet.steps, strict=True)
        if before.error <= tolerances.PORT and step.error > tolerances.LOUD
    ]
    found, _ = faults.forward(walk, mode, steps, explain=mode == LOUD)
    return found, all(fault.causes for fault in found)


class Bound(NamedTuple):
    """A number that an operation compares its input with."""

    owner: str
    """PyTorch's module or operation, or "JAX's network"."""

    number: float


def _unreached(walk: Walk) -> dict[tuple, Bound]:
    """Bounds of either network that no value reaches, by their place; a bound of 0 is none.

    Args:
      walk: one that has not begun.
    """
    torch_values, jax_values = dict(walk.of_torch), dict(walk.of_jax)
    jax_values |= {v: walk.leaves[n] for n, v in walk.subject.leaves.items()}
    found = {}
    for graph, values, bounds in (
        (walk.standard, torch_values, _of_torch),
        (walk.subject, jax_values, _of_jax),
    ):
        needed, data = graph.needed([graph.logits]), graph.data()
        with torch.no_grad():
            graph.evaluate(values, needed)
        for index in needed:
            operation = graph.operations[index]
            for which, (x, bound, reaches) in enumerate(bounds(operation, values, data)):
                if bound.number and not reaches(np.asarray(x), bound.number):
                    found[bound.owner, index, which] = bound
    return found


def _above(x, bound) -> bool:
    return bool((x > bound).any())


def _below(x, bound) -> bool:
    return bool((x < bound).any())


COMPARISONS = ("gt", "ge", "lt", "le")
"""A `where` has a bound in such an operation."""


def _of_torch(operation: Operation, values, data) -> Iterator[tuple]:
    """The numbers at which an operation cuts its input off, and what tells that a value is cut."""
    if operation.name == "relu6":
        given, tests = {"high": 6.0}, [("high", _above)]
    elif operation.name in ("hardtanh", "clamp", "clip", "clamp_min", "clamp_max"):
        names = {"clamp_min": "low", "clamp_max": "high"}.get(operation.name, "low high")
        given = variant.arguments(operation, names)
        tests = [("low", _below), ("high", _above)]
    elif operation.name in (*COMPARISONS, "threshold") and operation.inputs[0] in data:
        given = variant.arguments(operation, "bound")
        tests = [("bound", _below), ("bound", _above)]
    else:
        return
    for name, reaches in tests:
        number = given.get(name)
        if isinstance(number, int | float) and np.isfinite(number):
            owner = operation.module or operation.name
            yield values[operation.inputs[0]], Bound(owner, float(number)), reaches


def _of_jax(operation: Operation, values, data) -> Iterator[tuple]:
    """The same for the constants of a minimum, a maximum, a clamp or a comparison."""
    for x, bound, reaches in BOUNDED.get(operation.name, ()):
        x, bound = operation.inputs[x], operation.inputs[bound]
        numbers = np.asarray(values[bound])
        fixed = x in data and bound not in data
        if fixed and numbers.dtype.kind == "f" and np.isfinite(numbers).all():
            number = float(numbers.flat[np.abs(numbers).argmax()])
            yield values[x], Bound("JAX's network", number), reaches


BOUNDED = {
    "min": [(0, 1, _above), (1, 0, _above)],
    "max": [(0, 1, _below), (1, 0, _below)],
    "clamp": [(1, 0, _below), (1, 2, _above)],
    **dict.fromkeys(COMPARISONS, [(*p, f) for p in ((0, 1), (1, 0)) for f in (_below, _above)]),
}
"""{operation: (position of a number, position of its bound, what tells that it is reached)}."""
