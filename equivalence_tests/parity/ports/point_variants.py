"""Faults of activations, sums, products, joins and attention."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.norm_variants import EPSILONS
from equivalence_tests.parity.ports.variant import Variant

MOST_BRANCHES = 4
"""Most branches whose orders are tried."""


def joins(operation: Operation) -> Iterator[Variant]:
    """Branches that are joined in another order."""
    count = len(operation.inputs)
    if count <= MOST_BRANCHES:
        for order in itertools.islice(itertools.permutations(range(count)), 1, None):
            yield Variant(
                "the branches are joined in another order",
                lambda *parts, o=order: operation.run(*(parts[i] for i in o)),
            )


def activations(operation: Operation) -> Iterator[Variant]:
    others = {
        "gelu": ("GELU is exact", lambda x: F.gelu(x)),
        "tanh": ("GELU is the tanh approximation", lambda x: F.gelu(x, approximate="tanh")),
        "sigmoid": ("GELU is x sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x)),
        "relu": ("the activation is a ReLU", F.relu),
        "none": (f"there is no {operation.name} here", lambda x: x),
        "silu": ("the activation is SiLU", F.silu),
        "leaky": ("the ReLU is leaky, with slope 0.01", lambda x: F.leaky_relu(x, 0.01)),
        "relu6": ("the activation is ReLU6", F.relu6),
        "elu": ("the activation is ELU", F.elu),
        "hardswish": ("the activation is hard-swish", F.hardswish),
    }
    approximate = operation.options.get("kwargs", {}).get("approximate", "none")
    own = {"gelu": {"none": "gelu", "tanh": "tanh"}[approximate]}.get(
        operation.name, operation.name
    )
    for name, (reason, function) in others.items():
        if name != own:
            yield Variant(reason, lambda x, f=function: (f(x),))


def gates(operation: Operation) -> Iterator[Variant]:
    """A sigmoid, or one that is piecewise linear."""
    others = {
        "sigmoid": ("the gate is a sigmoid", torch.sigmoid),
        "hardsigmoid": ("the gate is relu6(x + 3) / 6", F.hardsigmoid),
        "clip": ("the gate is clip(0.2 x + 0.5, 0, 1)", lambda x: (0.2 * x + 0.5).clamp(0, 1)),
        "tanh": ("the gate is a tanh", torch.tanh),
        "none": (f"there is no {operation.name} here", lambda x: x),
    }
    for name, (reason, function) in others.items():
        if name != operation.name:
            yield Variant(reason, lambda x, f=function: (f(x),))


def additions(operation: Operation) -> Iterator[Variant]:
    if len(operation.inputs) != 2:
        yield from _added_eps(operation)
        return
    yield Variant("the first branch is not added", lambda a, b: (b + 0 * a,))
    yield Variant("the second branch is not added", lambda a, b: (a + 0 * b,))
    yield Variant("a ReLU stands before the addition", lambda a, b: (F.relu(a) + b,))
    yield Variant("a ReLU stands before the addition, on the other branch",
                  lambda a, b: (a + F.relu(b),))  # fmt: skip


def _added_eps(operation: Operation) -> Iterator[Variant]:
    """The eps of a norm that is written out, as RMSNorm is."""
    number = next((a for a in operation.options["args"] if isinstance(a, float)), None)
    if number is not None and 0 < number < 0.1:
        for eps in EPSILONS:
            if eps != number:
                yield Variant(f"eps is {eps:g} instead of {number:g}",
                              lambda x, eps=eps: (x + eps,))  # fmt: skip


def biases(operation: Operation) -> Iterator[Variant]:
    yield Variant(
        "there is no bias", lambda x, b: (x + 0 * operation.run(torch.zeros_like(x), b)[0],)
    )


def omissions(operation: Operation) -> Iterator[Variant]:
    """A subtraction or division of an image by an array that is missing."""
    if len(operation.inputs) == 2:
        yield Variant(f"there is no {operation.name} here", lambda x, by: (x + 0 * by,))


def factor(operation: Operation) -> float | None:
    """The number that an operation multiplies its input by; None if it does something else."""
    numbers = [a for a in operation.options.get("args", ()) if isinstance(a, int | float)]
    if operation.name not in ("mul", "div") or len(operation.inputs) != 1 or not numbers:
        return None
    return numbers[0] if operation.name == "mul" else 1 / numbers[0]


def scales(operation: Operation) -> Iterator[Variant]:
    """A constant factor that is missing, or its inverse."""
    number = factor(operation)
    if number is not None:
        yield Variant(f"the factor {number:.6g} is missing", lambda x: (x,))
        yield Variant(f"the factor {number:.6g} is applied twice",
                      lambda x: operation.run(*operation.run(x)))  # fmt: skip


def attentions(operation: Operation) -> Iterator[Variant]:
    """Attention whose scores are not divided by the root of the width, or twice."""
    query = operation.options["args"][0].meta["val"]
    root = query.shape[-1] ** 0.5
    if len(operation.inputs) > 2 and not operation.options["kwargs"]:  # no scale of its own
        yield Variant("the scores are not divided by the root of the width of a head",
                      lambda q, *rest: operation.run(q * root, *rest))  # fmt: skip
        yield Variant("the scores are divided by the root of the width of a head twice",
                      lambda q, *rest: operation.run(q / root, *rest))  # fmt: skip


def softmaxes(operation: Operation) -> Iterator[Variant]:
    x, own, *_ = operation.options["args"]
    rank = x.meta["val"].ndim
    for axis in set(range(rank)) - {own % rank}:
        yield Variant(f"softmax runs along axis {axis} instead of {own % rank}",
                      lambda x, axis=axis: (torch.softmax(x, axis),))  # fmt: skip
