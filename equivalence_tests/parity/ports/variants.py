"""Faults that ports are known to have, as other ways to run one operation of PyTorch.

A variant that gives what JAX has, where PyTorch's operation does not, is the cause of a difference.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from equivalence_tests.parity.causes.evidence import SAME
from equivalence_tests.parity.ports import (
    draws,
    exported,
    input_variants,
    norm_variants,
    point_variants,
    window_variants,
)
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.input_variants import NORMALISED
from equivalence_tests.parity.ports.layouts import closest, error_in
from equivalence_tests.parity.ports.variant import Variant
from equivalence_tests.parity.ports.walk import Step, Walk

Cause = dict[int, Variant]
"""{index of PyTorch's operation: variant}; together they give what JAX has."""


def variants(operation: Operation) -> Iterator[Variant]:
    """All known faults of one operation."""
    for find in VARIANTS.get(operation.name, ()):
        yield from find(operation)


def explain(walk: Walk, step: Step, got) -> list[Cause]:
    """The variants of one or two operations above an anchor which give what JAX has there.

    Args:
      walk: any time after the step.
      got: JAX's activation.
    """
    known = {v: a for v, a in walk.of_torch.items() if v != step.standard}
    choices = _choices(walk, step)
    for index in step.operations:
        factor = _factor(walk, known, step, got, index)
        choices[index] += [factor] if factor else []
    for number in (1, 2):
        found = []
        for indices in itertools.combinations([i for i in choices if choices[i]], number):
            causes = (
                dict(zip(indices, chosen, strict=True))
                for chosen in itertools.product(*(choices[i] for i in indices))
            )
            runs = ((c, {i: v.run for i, v in c.items()}) for c in causes)
            first = next((c for c, run in runs if _gives(walk, known, step, got, run)), None)
            found += [first] if first else []
        if found:
            return _plainest(walk, found)
    return []


def _choices(walk: Walk, step: Step) -> dict[int, list[Variant]]:
    """The variants of each operation above an anchor."""
    first = input_variants.normalisations(walk, step)
    dropped = step.drawn.dropouts
    operations = {i: walk.standard.operations[i] for i in step.operations}
    return {
        i: [*first.get(i, ()), *variants(operation), *draws.extra(operation, dropped)]
        for i, operation in operations.items()
    }


def _factor(walk: Walk, known, step: Step, got, index: int) -> Variant | None:
    """A product with another number, of which the activation at the anchor is a linear function."""
    operation = walk.standard.operations[index]
    number = point_variants.factor(operation)
    if number is None or np.size(got) != np.prod(step.shapes[0]):
        return None
    runs = ({index: lambda *arrays, s=s: (s * operation.run(*arrays)[0],)} for s in (0.0, 1.0))
    with torch.no_grad():
        without, own = (walk.standard.evaluate(dict(known), step.operations, run)[step.standard]
                        for run in runs)  # fmt: skip
    part, wanted = own - without, step.layout.to_torch(got) - without
    times = float((part * wanted).sum() / part.square().sum().clamp_min(1e-300))
    reason = f"the factor is {times * number:.6g} instead of {number:.6g}"
    return Variant(reason, lambda *arrays: (times * operation.run(*arrays)[0],))


def _plainest(walk: Walk, found: list[Cause]) -> list[Cause]:
    """The causes that speak of dropout or of normalised images, if there are any.

    Of those that say that JAX drops more, the last.
    """
    operations = walk.standard.operations
    of_dropout = [c for c in found if any(operations[i].name == draws.KEEP for i in c)]
    of_input = [c for c in found if any(NORMALISED in v.reason for v in c.values())]
    of_more = [c for c in found if any(v.reason.startswith(draws.EXTRA) for v in c.values())]
    return of_dropout or of_input or of_more[-1:] or found


def _gives(walk: Walk, known, step: Step, got, runs) -> bool:
    try:
        with torch.no_grad():
            values = walk.standard.evaluate(dict(known), step.operations, runs)
    except (RuntimeError, ValueError):  # this fault does not apply to such arrays
        return False
    found = values[step.standard]
    # A variant that changes nothing must not explain a small difference.
    return _error(found, got, step) < min(SAME, step.error / 100)


def nearly(a, b) -> bool:
    """True if two arrays are equal up to rounding."""
    return np.linalg.norm(a - b) <= SAME * max(np.linalg.norm(b), 1e-12)


def _error(found: torch.Tensor, got, step: Step) -> float:
    """The error in the layout of the step, or in the usual one if the shapes differ."""
    if tuple(found.shape) == step.shapes[0]:
        return error_in(step.layout, found.numpy(), np.asarray(got))
    return closest(found, got)[0]


ACTIVATIONS = (
    "relu", "gelu", "silu", "hardswish", "leaky_relu", "relu6", "hardtanh", "elu",
)  # fmt: skip
GATES = ("sigmoid", "hardsigmoid", "tanh")
RESIZES = ("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d")

VARIANTS: dict[str, tuple[Callable[[Operation], Iterator[Variant]], ...]] = {
    draws.KEEP: (draws.dropouts,),
    "conv2d": (window_variants.convolutions, window_variants.patches),
    "conv_transpose2d": (window_variants.transposed_convolutions,),
    "max_pool2d": (window_variants.max_pools,),
    "avg_pool2d": (window_variants.average_pools,),
    "adaptive_avg_pool2d": (window_variants.global_pools,),
    exported.BATCH_NORM: (
        norm_variants.epsilons,
        norm_variants.modes,
        norm_variants.unbiased,
        norm_variants.averaged,
        norm_variants.axes,
    ),
    "rms_norm": (norm_variants.epsilons,),
    "layer_norm": (norm_variants.epsilons, norm_variants.norms),
    "instance_norm": (norm_variants.epsilons,),
    "group_norm": (norm_variants.epsilons, norm_variants.norms),
    **dict.fromkeys(ACTIVATIONS, (point_variants.activations,)),
    **dict.fromkeys(GATES, (point_variants.gates,)),
    **dict.fromkeys(RESIZES, (window_variants.interpolations,)),
    "add": (point_variants.additions,),
    "add_bias": (point_variants.biases,),
    "mul": (point_variants.scales, point_variants.omissions),
    "div": (point_variants.scales, point_variants.omissions),
    "sub": (point_variants.omissions,),
    "mean": (window_variants.means,),
    "cat": (point_variants.joins,),
    "scaled_dot_product_attention": (point_variants.attentions,),
    "softmax": (point_variants.softmaxes,),
}
