"""Differences that only large or only small values show.

In evaluation both networks also see the images times a factor, so that activations reach the
bounds, of a ReLU6 or a clip. If a bound is near 0, as the one that keeps a division from 0, both
also compute with their parameters times a small number.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports import faults, variant
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.mapping import Mapping, filled
from equivalence_tests.parity.ports.walk import Step, Walk
from flax_resnet.errors import InputError

FACTOR = 16
"""The images are multiplied by this number, so that values reach large bounds."""

SMALL = 1e-14
"""The parameters are multiplied by this number, so that values reach small bounds, of which the
usual one is 1e-12."""

GUARD = 1e-3
"""Bounds of at most this size are small."""

AMPLIFIED = 1e3
"""A difference at small values counts if it is larger than the rounding there by this factor. It is
4 times the rounding in a right port (generalised mean pooling), and 1e15 times that of another
bound."""

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
        left = _unlike({place: bound for place, bound in left.items() if place in still})
        if _is_followed(walk, quiet):
            more, _ = _faults(walk, quiet, FAINT)
            found, explained = found + more, explained and not more
    sentences = (f"{b.owner} never reaches its bound of {b.number:g}" for b in left.values())
    return found, explained, [*dict.fromkeys(sentences), *hidden]


def _unlike(bounds: dict[tuple, "Bound"]) -> dict[tuple, "Bound"]:
    """Without the small bounds that both networks have, and as often."""
    counts = {True: Counter(), False: Counter()}
    small = {place: b for place, b in bounds.items() if abs(b.number) <= GUARD}
    for bound in small.values():
        counts[bound.owner == JAX][f"{bound.number:.6g}"] += 1
    unlike = {n for n, count in (counts[True] | counts[False]).items()
              if count > counts[True][n] or count > counts[False][n]}  # fmt: skip
    return {p: b for p, b in bounds.items() if p not in small or f"{b.number:.6g}" in unlike}


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
        if mode == LOUD or step.error > AMPLIFIED * _rounding(walk, step)
    ]
    found, _ = faults.forward(walk, mode, steps, explain=mode == LOUD)
    return found, all(fault.causes for fault in found)


def _rounding(walk: Walk, step: Step) -> float:
    """Returns the relative change of an activation if all numbers above it are rounded otherwise.

    A layer that subtracts a mean, or has a root of a small number, may have no right digit left.
    """
    rng = np.random.default_rng(0)

    def rounded(array):
        if not array.is_floating_point():
            return array
        signs = np.asarray(rng.choice([-1.0, 1.0], tuple(array.shape)))
        return array * torch.as_tensor(1 + np.finfo(float).eps * signs)

    def run(operation, *arrays):
        return tuple(map(rounded, operation.run(*arrays)))

    known = {v: a for v, a in walk.of_torch.items() if v != step.standard}
    runs = {i: partial(run, walk.standard.operations[i]) for i in step.operations}
    with torch.no_grad():
        own = walk.standard.evaluate(dict(known), step.operations)[step.standard]
        known = {v: rounded(array) for v, array in known.items()}
        changed = walk.standard.evaluate(known, step.operations, runs)[step.standard]
    return tolerances.relative_error(changed, own)


class Bound(NamedTuple):
    """A number that an operation compares its input with."""

    owner: str
    """PyTorch's module or operation, or `JAX`."""

    number: float


JAX = "JAX's network"


def _unreached(walk: Walk) -> dict[tuple, Bound]:
    """Bounds of either network that no value reaches, by their place; a bound of 0 is none.

    Args:
      walk: one that has not begun.
    """
    torch_values, jax_values = dict(walk.of_torch), dict(walk.of_jax)
    jax_values |= {v: walk.leaves[n] for n, v in walk.subject.leaves.items()}
    found = {}
    for graph, values, side in ((walk.standard, torch_values, ""), (walk.subject, jax_values, JAX)):
        needed, data = graph.needed([graph.logits]), graph.data()
        moving = data | graph.below(graph.leaves.values())
        with torch.no_grad():
            graph.evaluate(values, needed)
        for index in needed:
            operation = graph.operations[index]
            numbers = [
                *_arguments(operation, values, data),
                *_inputs(operation, values, data, moving),
            ]
            for which, (x, number, reaches) in enumerate(numbers):
                if number and not reaches(np.asarray(x), number):
                    owner = side or operation.module or operation.name
                    found[side, index, which] = Bound(owner, number)
    return found


def _above(x, bound) -> bool:
    return bool((x > bound).any())


def _below(x, bound) -> bool:
    return bool((x < bound).any())


COMPARISONS = ("gt", "ge", "lt", "le")
"""A `where` has a bound in such an operation."""


def _arguments(operation: Operation, values, data) -> Iterator[tuple]:
    """The numbers at which an operation of PyTorch cuts its input off, and what tells that a value
    is cut."""
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
            yield values[operation.inputs[0]], float(number), reaches


def _inputs(operation: Operation, values, data, moving) -> Iterator[tuple]:
    """The same where the number is a constant among the inputs of an operation.

    Args:
      data: values that are computed from the images.
      moving: values that are computed from the images or parameters.
    """
    for x, bound, reaches in BOUNDED.get(operation.name, ()):
        if max(x, bound) >= len(operation.inputs):
            continue
        x, bound = operation.inputs[x], operation.inputs[bound]
        numbers = np.asarray(values[bound])
        fixed = x in data and bound not in moving
        if fixed and numbers.dtype.kind == "f" and np.isfinite(numbers).all():
            yield values[x], float(numbers.flat[np.abs(numbers).argmax()]), reaches


BOUNDED = {
    **dict.fromkeys(("min", "minimum"), [(0, 1, _above), (1, 0, _above)]),
    **dict.fromkeys(("max", "maximum"), [(0, 1, _below), (1, 0, _below)]),
    "clamp": [(1, 0, _below), (1, 2, _above), (0, 1, _below), (0, 2, _above)],  # JAX's, PyTorch's
    "clamp_min": [(0, 1, _below)],
    "clamp_max": [(0, 1, _above)],
    **dict.fromkeys(COMPARISONS, [(*p, f) for p in ((0, 1), (1, 0)) for f in (_below, _above)]),
}
"""{operation: (position of a number, position of its bound, what tells that it is reached)}."""
