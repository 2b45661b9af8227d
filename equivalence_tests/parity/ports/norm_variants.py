"""Faults of normalisations."""

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from equivalence_tests.parity.ports import exported
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.variant import Variant

EPSILONS = (1e-3, 1e-6, 1.001e-5, 1e-5, 1e-12, 0.0, 1e-4, 1e-2, 2e-5, 1e-8)


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
    if operation.name == "instance_norm":
        return operation.options["args"][7]
    numbers = [a for a in operation.options["args"] if isinstance(a, float)]
    return (numbers or [operation.options["kwargs"].get("eps", 1e-5)])[0]


def _with_eps(operation: Operation, eps: float, *arrays):
    if operation.name == "rms_norm":
        return (F.rms_norm(arrays[0], operation.options["args"][1], *arrays[1:], eps=eps),)
    if operation.name == "layer_norm":
        return (F.layer_norm(arrays[0], operation.options["args"][1], *arrays[1:], eps=eps),)
    if operation.name == "instance_norm":
        groups = arrays[0].shape[1]
    else:
        groups = operation.options["args"][1]
    return (F.group_norm(arrays[0], groups, *arrays[1:], eps=eps),)


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
    if operation.options["training"] and operation.options["given"][2]:
        for share in dict.fromkeys((operation.options["momentum"], 0.1, 0.01, 0.001)):
            reason = f"BatchNorm normalises by averages of which the batch is {share:g}"
            yield _batch_norm(operation, reason, by=functools.partial(_blended, share))


def _blended(share: float, x, *running):
    pairs = zip(running, exported.batch_statistics(x), strict=True)
    return [(1 - share) * old + share * new for old, new in pairs]


def axes(operation: Operation) -> Iterator[Variant]:
    """Training that normalises by the statistics of other axes than those of a channel."""
    if operation.options["training"]:
        for count in range(1, 5):
            for chosen in itertools.combinations(range(4), count):
                if chosen != (0, 2, 3):
                    names = ", ".join("BCHW"[axis] for axis in chosen)
                    reason = f"BatchNorm normalises over the axes {names} instead of B, H, W"
                    yield _batch_norm(operation, reason, by=functools.partial(_over, chosen))


def _over(axes, x, *_):
    if x.ndim != 4:
        raise ValueError(f"{axes} are axes of images")
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return mean, variance
