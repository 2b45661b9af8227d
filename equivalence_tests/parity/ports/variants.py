"""Faults that ports are known to have, as other ways to run one operation of PyTorch.

A variant that gives what JAX has, where PyTorch's operation does not, is the cause of a difference.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from equivalence_tests.parity.causes.evidence import SAME
from equivalence_tests.parity.causes.in_layers import interleaved, padded_same
from equivalence_tests.parity.ports import exported
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.walk import Step, Walk, closest, error_in

EPSILONS = (1e-3, 1e-6, 1.001e-5, 1e-5, 1e-12, 0.0, 1e-4, 1e-2, 2e-5, 1e-8)


class Variant(NamedTuple):
    """Another way to run an operation."""

    reason: str
    """A sentence about the difference, without its layer."""

    run: Callable[..., tuple] | None

    options: dict[str, Any] = {}
    """Options of `exported.batch_norm` that differ, so that several variants can be joined."""


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
    choices = {i: list(variants(walk.standard.operations[i])) for i in step.operations}
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
            return found
    return []


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


def arguments(operation: Operation, names: str) -> dict[str, Any]:
    """The static arguments of an operation by name, from those that stand after its arrays."""
    given = [a for a in operation.options.get("args", ()) if not hasattr(a, "op")]
    given = operation.options.get("arguments", given)
    return dict(zip(names.split(), given, strict=False)) | operation.options.get("kwargs", {})


def pair(value) -> tuple[int, int]:
    """One number for height and width, or both."""
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def convolutions(operation: Operation) -> Iterator[Variant]:
    given = arguments(operation, "stride padding dilation groups")
    stride, padding = pair(given.get("stride", 1)), given.get("padding", 0)
    dilation, groups = pair(given.get("dilation", 1)), given.get("groups", 1)
    padding = padding if isinstance(padding, str) else pair(padding)

    def conv(x, w, stride=stride, padding=padding, groups=groups):
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    def same(x, w):
        return conv(padded_same(x, w.shape[2:], stride, 0.0, dilation), w, padding=(0, 0))

    yield Variant('the padding is "SAME"', lambda x, w: (same(x, w),))
    yield Variant("there is no padding", lambda x, w: (conv(x, w, padding=(0, 0)),))
    yield Variant("the kernel is rotated by 180 degrees", lambda x, w: (conv(x, w.flip(2, 3)),))
    yield Variant("the kernel's height and width are swapped",
                  lambda x, w: (conv(x, w.transpose(2, 3)),))  # fmt: skip
    if groups == 1:
        yield Variant("the input channels are in reverse order (BGR for RGB)",
                      lambda x, w: (conv(x, w.flip(1)),))  # fmt: skip
    for other in ((1, 1), (2, 2)):
        if other != stride:
            yield Variant(f"the stride is {other[0]} instead of {stride[0]}",
                          lambda x, w, s=other: (conv(x, w, stride=s),))  # fmt: skip
    if groups > 1:
        yield Variant("groups are interleaved", lambda x, w: (interleaved(conv(x, w), groups),))
    if max(dilation) > 1:
        yield Variant("there is no dilation",
                      lambda x, w: (F.conv2d(x, w, None, stride, padding, 1, groups),))  # fmt: skip


def patches(operation: Operation) -> Iterator[Variant]:
    """A kernel that is a matrix of flattened patches in JAX, filled in another order."""
    given = arguments(operation, "stride padding dilation groups")

    def reordered(axes, x, w):
        if tuple(w.shape[2:]) != pair(given.get("stride", 1)) or w.shape[2:].numel() == 1:
            raise ValueError("no patches")
        sizes = [w.shape[1:][axis] for axis in axes]
        back = [1 + axes.index(axis) for axis in range(3)]
        return operation.run(x, w.reshape(len(w), *sizes).permute(0, *back))

    for axes in itertools.islice(itertools.permutations(range(3)), 1, None):
        names = ", ".join(("channel", "row", "column")[axis] for axis in axes)
        reason = f"the kernel's values of a patch are read in the order {names}"
        yield Variant(reason, functools.partial(reordered, axes))


def transposed_convolutions(operation: Operation) -> Iterator[Variant]:
    """Flax and Lax cut the edges of the whole output where PyTorch subtracts its padding."""
    given = arguments(operation, "stride padding output_padding groups dilation")
    stride, dilation = pair(given.get("stride", 1)), pair(given.get("dilation", 1))
    groups = given.get("groups", 1)

    def whole(x, w):
        return F.conv_transpose2d(x, w, None, stride, 0, max(stride) - 1, groups, dilation)

    def cut(begin, size, x, w):
        reach = [d * (n - 1) for d, n in zip(dilation, w.shape[2:], strict=True)]
        starts = [begin(s, r) for s, r in zip(stride, reach, strict=True)]
        rows, columns = (slice(a, a + size(n, s, r)) for a, n, s, r in
                         zip(starts, x.shape[2:], stride, reach, strict=True))  # fmt: skip
        return (whole(x, w)[:, :, rows, columns],)

    same = functools.partial(cut, _same_begin, lambda n, s, r: n * s)
    full = functools.partial(cut, lambda s, r: 0, lambda n, s, r: n * s + max(r + 1 - s, 0))
    yield Variant('the padding is "SAME"', same)
    yield Variant('the padding is "VALID"', full)
    for reason, other in (
        ("the kernel is rotated by 180 degrees", lambda w: w.flip(2, 3)),
        ("the kernel's height and width are swapped", lambda w: w.transpose(2, 3)),
    ):
        yield Variant(reason, lambda x, w, o=other: operation.run(x, o(w)))


def _same_begin(stride: int, reach: int) -> int:
    """What lax.conv_transpose cuts off in front for "SAME"; `reach` is the window less one."""
    before = reach if stride > reach else -(-(reach + stride - 1) // 2)
    return reach - before


def max_pools(operation: Operation) -> Iterator[Variant]:
    given = arguments(operation, "window stride padding")
    window = pair(given["window"])
    stride = pair(given.get("stride") or window)

    def same(x, value=-np.inf):
        return F.max_pool2d(padded_same(x, window, stride, value), window, stride)

    padding = pair(given.get("padding", 0))
    pads = [padding[1], padding[1], padding[0], padding[0]]
    yield Variant('the max-pool pads as "SAME"', lambda x: (same(x),))
    yield Variant('the max-pool pads as "SAME", with zeros', lambda x: (same(x, 0.0),))
    yield Variant("the max-pool has no padding", lambda x: (F.max_pool2d(x, window, stride),))
    yield Variant("the max-pool pads with zeros",
                  lambda x: (F.max_pool2d(F.pad(x, pads), window, stride),))  # fmt: skip
    yield Variant("it is an average pool",
                  lambda x: (F.avg_pool2d(x, window, stride, padding),))  # fmt: skip
    yield Variant("there is no max-pool", lambda x: (x,))


def average_pools(operation: Operation) -> Iterator[Variant]:
    given = arguments(operation, "window stride padding ceil_mode count_include_pad")
    window = pair(given["window"])
    stride, padding = pair(given.get("stride") or window), pair(given.get("padding", 0))
    counted = given.get("count_include_pad", True)
    what = "does not count" if counted else "counts"
    pool = functools.partial(F.avg_pool2d, kernel_size=window, stride=stride)
    other = functools.partial(pool, padding=padding, count_include_pad=not counted)
    yield Variant(f"the average pool {what} its padding", lambda x: (other(x),))
    yield Variant("the average pool has no padding", lambda x: (pool(x),))
    for count in (False, True):
        yield Variant('the average pool pads as "SAME"' + (", counting it" if count else ""),
                      functools.partial(_same_average, window, stride, count))  # fmt: skip
    yield Variant("it is a max-pool", lambda x: (F.max_pool2d(x, window, stride, padding),))


def _same_average(window, stride, count, x):
    def pool(a):
        return F.avg_pool2d(padded_same(a, window, stride, 0.0), window, stride)

    return (pool(x) if count else pool(x) / pool(torch.ones_like(x)),)


def global_pools(operation: Operation) -> Iterator[Variant]:
    yield Variant("it is a global max-pool", lambda x: (x.amax((2, 3), keepdim=True),))
    yield Variant("it is a sum over pixels", lambda x: (x.sum((2, 3), keepdim=True),))
    for pad in (1, 2, 3):
        yield Variant(f"the global average counts a padding of {pad}",
                      lambda x, p=pad: (F.pad(x, [p] * 4).mean((2, 3), keepdim=True),))  # fmt: skip


def means(operation: Operation) -> Iterator[Variant]:
    """Another reduction than a mean, over the same axes."""
    given = arguments(operation, "axes keepdim")
    axes, kept = given.get("axes"), given.get("keepdim", False)
    if axes:
        yield Variant("it is a maximum instead of a mean", lambda x: (x.amax(axes, kept),))
        yield Variant("it is a sum instead of a mean", lambda x: (x.sum(axes, kept),))


def joins(operation: Operation) -> Iterator[Variant]:
    """Branches that are joined in another order."""
    count = len(operation.inputs)
    if count <= MOST_BRANCHES:
        for order in itertools.islice(itertools.permutations(range(count)), 1, None):
            yield Variant(
                "the branches are joined in another order",
                lambda *parts, o=order: operation.run(*(parts[i] for i in o)),
            )


MOST_BRANCHES = 4


def epsilons(operation: Operation) -> Iterator[Variant]:
    usual = operation.options["eps"] if "eps" in operation.options else _given_eps(operation)
    for eps in EPSILONS:
        if eps != usual:
            reason = f"eps is {eps:g} instead of {usual:g}"
            if operation.name == exported.BATCH_NORM:
                yield _batch_norm(operation, reason, eps=eps)
            else:
                yield Variant(reason, functools.partial(_with_eps, operation, eps))


def _batch_norm(operation: Operation, reason: str, **options) -> Variant:
    return Variant(reason, exported.batch_norm_of(operation, options), options)


def _given_eps(operation: Operation) -> float:
    numbers = [a for a in operation.options["args"] if isinstance(a, float)]
    return (numbers or [operation.options["kwargs"].get("eps", 1e-5)])[0]


def _with_eps(operation: Operation, eps: float, *arrays):
    if operation.name == "rms_norm":
        return (F.rms_norm(arrays[0], operation.options["args"][1], *arrays[1:], eps=eps),)
    if operation.name == "layer_norm":
        return (F.layer_norm(arrays[0], operation.options["args"][1], *arrays[1:], eps=eps),)
    return (F.group_norm(arrays[0], operation.options["args"][1], *arrays[1:], eps=eps),)


def norms(operation: Operation) -> Iterator[Variant]:
    """LayerNorm and GroupNorm over other axes, or without their parameters."""
    run, eps = operation.run, _given_eps(operation)
    count = len(operation.inputs)
    if count > 2:
        yield Variant("there is no bias", lambda x, w, b: run(x, w, 0 * b))
    if count > 1:
        yield Variant("there is no scale", lambda x, w, *b: run(x, 0 * w + 1, *b))
    if operation.name == "layer_norm":
        channel, given = -1, None
        yield Variant(
            "the LayerNorm is over all axes but the batch's",
            lambda x, *p: (_normed(x, tuple(range(1, x.ndim)), channel, eps, p),),
        )
    else:
        channel, given = 1, operation.options["args"][1]
        yield Variant("it is a LayerNorm over the channels",
                      lambda x, *p: (_normed(x, (1,), channel, eps, p),))  # fmt: skip
    channels = operation.options["args"][0].meta["val"].shape[channel]
    for groups in [n for n in range(1, channels + 1) if channels % n == 0 and n != given]:
        if given:
            yield Variant(f"the GroupNorm has {groups} groups instead of {given}",
                          lambda x, *p, g=groups: (F.group_norm(x, g, *p, eps=eps),))  # fmt: skip


def _normed(x, axes, channel, eps, parameters):
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    shape = [1] * x.ndim
    shape[channel] = -1
    y = (x - mean) * (variance + eps).rsqrt()
    weight, bias = (*parameters, None, None)[:2]
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def modes(operation: Operation) -> Iterator[Variant]:
    """BatchNorm that takes the statistics of the other mode."""
    training = operation.options["training"]
    what = "the running" if training else "the batch's"
    reason = f"BatchNorm normalises by {what} statistics"
    yield _batch_norm(operation, reason, training=not training)


def unbiased(operation: Operation) -> Iterator[Variant]:
    if operation.options["training"]:
        reason = "BatchNorm normalises by the unbiased variance of the batch"
        yield _batch_norm(operation, reason, by=lambda x, *_: exported.batch_statistics(x, 1))


def averaged(operation: Operation) -> Iterator[Variant]:
    """Training that normalises by the running statistics after the batch, as Equinox's does."""
    if operation.options["training"]:
        for share in dict.fromkeys((operation.options["momentum"], 0.1, 0.01, 0.001)):
            reason = f"BatchNorm normalises by averages of which the batch is {share:g}"
            yield _batch_norm(operation, reason, by=functools.partial(_blended, share))


def _blended(share: float, x, *running):
    pairs = zip(running, exported.batch_statistics(x), strict=True)
    return [(1 - share) * old + share * new for old, new in pairs]


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


def scales(operation: Operation) -> Iterator[Variant]:
    """A constant factor that is missing, or its inverse."""
    numbers = [a for a in operation.options.get("args", ()) if isinstance(a, int | float)]
    if len(operation.inputs) == 1 and numbers:
        yield Variant(f"the factor {numbers[0]:.6g} is missing", lambda x: (x,))
        yield Variant(f"the factor {numbers[0]:.6g} is applied twice",
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


def interpolations(operation: Operation) -> Iterator[Variant]:
    for mode in ("bilinear", "bicubic"):
        for align in (False, True):
            yield Variant(
                f"the resize is {mode} with align_corners={align}",
                lambda x, m=mode, a=align: (
                    F.interpolate(x, tuple(operation.run(x)[0].shape[2:]), mode=m, align_corners=a),
                ),
            )
    yield Variant("the resize takes the nearest pixel",
                  lambda x: (F.interpolate(x, tuple(operation.run(x)[0].shape[2:])),))  # fmt: skip


VARIANTS: dict[str, tuple[Callable[[Operation], Iterator[Variant]], ...]] = {
    "conv2d": (convolutions, patches),
    "conv_transpose2d": (transposed_convolutions,),
    "max_pool2d": (max_pools,),
    "avg_pool2d": (average_pools,),
    "adaptive_avg_pool2d": (global_pools,),
    exported.BATCH_NORM: (epsilons, modes, unbiased, averaged),
    "rms_norm": (epsilons,),
    "layer_norm": (epsilons, norms),
    "group_norm": (epsilons, norms),
    "relu": (activations,),
    "gelu": (activations,),
    "silu": (activations,),
    "hardswish": (activations,),
    "leaky_relu": (activations,),
    "relu6": (activations,),
    "hardtanh": (activations,),
    "elu": (activations,),
    "sigmoid": (gates,),
    "hardsigmoid": (gates,),
    "tanh": (gates,),
    "add": (additions,),
    "add_bias": (biases,),
    "mul": (scales, omissions),
    "div": (scales, omissions),
    "sub": (omissions,),
    "mean": (means,),
    "cat": (joins,),
    "scaled_dot_product_attention": (attentions,),
    "softmax": (softmaxes,),
    "upsample_bilinear2d": (interpolations,),
    "upsample_bicubic2d": (interpolations,),
    "upsample_nearest2d": (interpolations,),
}
