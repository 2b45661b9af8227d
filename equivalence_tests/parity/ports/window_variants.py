"""Faults of operations that see a window of an image: convolutions, pools, resizing."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from equivalence_tests.parity.causes.in_layers import interleaved, padded_same
from equivalence_tests.parity.ports.graph import Operation
from equivalence_tests.parity.ports.variant import Variant, arguments, pair


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
    """The number of pixels that lax.conv_transpose cuts off in front for "SAME".

    Args:
      reach: the window less one.
    """
    before = reach if stride > reach else -(-(reach + stride - 1) // 2)
    return reach - before


def max_pools(operation: Operation) -> Iterator[Variant]:
    given = arguments(operation, "window stride padding dilation ceil_mode")
    window = pair(given["window"])
    stride = pair(given.get("stride") or window)
    yield _rounded("max-pool", F.max_pool2d, window, stride, given)

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
    yield _rounded("average pool", F.avg_pool2d, window, stride, given, count_include_pad=counted)
    pool = functools.partial(F.avg_pool2d, kernel_size=window, stride=stride)
    other = functools.partial(pool, padding=padding, count_include_pad=not counted)
    yield Variant(f"the average pool {what} its padding", lambda x: (other(x),))
    yield Variant("the average pool has no padding", lambda x: (pool(x),))
    for count in (False, True):
        yield Variant('the average pool pads as "SAME"' + (", counting it" if count else ""),
                      functools.partial(_same_average, window, stride, count))  # fmt: skip
    yield Variant("it is a max-pool", lambda x: (F.max_pool2d(x, window, stride, padding),))


def _rounded(name, pool, window, stride, given, **options) -> Variant:
    """A pool that rounds its size up instead of down, or down instead of up."""
    up = not given.get("ceil_mode", False)
    reason = f"the {name} rounds its size {'up' if up else 'down'} (ceil_mode={up})"
    padding = given.get("padding", 0)
    return Variant(reason, lambda x: (pool(x, window, stride, padding, ceil_mode=up, **options),))


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


def interpolations(operation: Operation) -> Iterator[Variant]:
    for mode in ("bilinear", "bicubic"):
        for align in (False, True):
            yield Variant(
                f"the resize is {mode} with align_corners={align}",
                lambda x, m=mode, a=align: (
                    F.interpolate(x, tuple(operation.run(x)[0].shape[2:]), mode=m, align_corners=a),
                ),
            )
        yield Variant(
            f"the resize is {mode} with antialias=True",
            lambda x, m=mode: (
                F.interpolate(x, tuple(operation.run(x)[0].shape[2:]), mode=m, antialias=True),
            ),
        )
    yield Variant("the resize takes the nearest pixel",
                  lambda x: (F.interpolate(x, tuple(operation.run(x)[0].shape[2:])),))  # fmt: skip
