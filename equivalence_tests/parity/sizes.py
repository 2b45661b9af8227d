"""Image sizes at which a wrong padding of a strided layer changes the output.

At odd sizes, "SAME" padding equals one pixel on every side. At even sizes, a missing pixel at the
end is never read. So every axis with a stride must see a size that the stride divides and one that
it does not. Images of height H and width W do not suffice, but with those of height W and width H
they do.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Layer(NamedTuple):
    """A convolution or pool at one call; each pair is for height and width."""

    size: tuple[int, int]
    """The size of the input."""

    divisors: tuple[int, int]
    """The stride; of an adaptive pool, the size of the output."""

    kind: str = "window"
    """"window", "adaptive", or "patches": a convolution whose stride is its window."""


def layers(net: nn.Module, size: tuple[int, int], channels: int) -> dict[str, Layer] | None:
    """The layers of a network whose padding the size of the images can hide.

    Args:
      net: takes `[1, channels, H, W]`; runs in evaluation mode, without gradients.
      size: `(H, W)`.

    Returns:
      By the name of their module; the second call of one is `name:2`. None if the network raises.
    """
    calls, training = _Calls(), net.training
    handles = [
        hook
        for name, module in net.named_modules()
        for hook in (
            module.register_forward_pre_hook(lambda *_, name=name: calls.modules.append(name)),
            module.register_forward_hook(lambda *_: calls.modules.pop() and None),
        )
    ]
    first = next(net.parameters())
    try:
        with torch.no_grad(), calls:
            net.eval()(torch.zeros(1, channels, *size, dtype=first.dtype, device=first.device))
    except Exception:  # whatever the user's own code raises
        return None
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return calls.found


class _Calls(TorchDispatchMode):
    """Notes the layers while a network runs."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, Layer] = {}
        self.modules: list[str] = []
        """Names of the modules that run, the innermost last."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        layer = _layer(function.overloadpacket.__name__, args)
        if layer:
            name = (self.modules and self.modules[-1]) or function.overloadpacket.__name__
            again = sum(key.split(":")[0] == name for key in self.found)
            self.found[f"{name}:{again + 1}" if again else name] = layer
        return function(*args, **(kwargs or {}))


def _layer(operation: str, args) -> Layer | None:
    """The layer of a call of one of PyTorch's operations; None if no padding can hide in it."""
    if operation in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
        return Layer(tuple(args[0].shape[-2:]), tuple(args[1]), "adaptive")
    if operation == "convolution":
        window, stride, transposed = tuple(args[1].shape[2:]), tuple(args[3]), args[6]
        if len(window) != 2 or transposed:
            return None
    elif operation in ("max_pool2d_with_indices", "avg_pool2d"):
        window, stride = _pair(args[1]), _pair(args[2] if len(args) > 2 and args[2] else args[1])
    else:
        return None
    if max(window) == 1 or max(stride) == 1:
        return None
    patches = operation == "convolution" and window == stride and not any(args[4])
    return Layer(tuple(args[0].shape[-2:]), stride, "patches" if patches else "window")


def _pair(value) -> tuple[int, int]:
    return tuple(value) * (2 // len(value))


def faults(
    net: nn.Module,
    sizes: Sequence[tuple[int, int]],
    channels: int,
    takes: Callable[[tuple[int, int]], bool] = lambda size: True,
) -> list[str] | None:
    """Layers whose input sizes would hide a wrong padding, one sentence each; [] if none.

    Args:
      sizes: (H, W) of all images that are compared. Of one alone, height and width count together,
        as if no padding were wrong along one axis only.
      takes: (H, W) -> True if the network that is compared with this one takes such images.

    Returns:
      None if the network raises on the first size.
    """
    seen = [found for size in sizes if (found := layers(net, size, channels)) is not None]
    if not seen:
        return None
    sentences = []
    for name, layer in seen[0].items():
        words = _missing([found[name] for found in seen if name in found])
        if layer.kind == "patches" and any(words):
            others = _padded(layer, sizes[0])
            if any(layers(net, s, channels) is None or not takes(s) for s in others):
                continue  # not silent: where padding changes something, a network raises
        if any(words):
            sentences.append(f"{name} sees only {_described(words, layer.size)}")
    return sentences


def _missing(calls: list[Layer]) -> list[str]:
    """For each axis the one kind of sizes that a layer sees; "" if that suffices."""
    divisors, kind = calls[0].divisors, calls[0].kind
    divided = [{call.size[axis] % divisors[axis] == 0 for call in calls} for axis in (0, 1)]
    if len(calls) == 1:
        divided = 2 * [set().union(*(divided[axis] for axis in (0, 1) if divisors[axis] > 1))]
    return [
        "" if divisor == 1 or len(found) == 2 or (kind != "window" and found == {False})
        else WORDS[divisor == 2][found == {True}]
        for divisor, found in zip(divisors, divided, strict=True)
    ]  # fmt: skip


WORDS = (("indivisible", "divisible"), ("odd", "even"))


def _padded(layer: Layer, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of images at which a layer sees a pixel more, and more patches."""
    pixel = [-(-pixels // own) for pixels, own in zip(size, layer.size, strict=True)]
    return [(size[0] + pixel[0], size[1] + pixel[1]), (2 * size[0], 2 * size[1])]


def _described(words: list[str], size: tuple[int, int]) -> str:
    """The kinds of heights and widths as text, for example "even sizes (12 x 14)"."""
    sides = [f"{w} {side}" for w, side in zip(words, ("heights", "widths"), strict=True) if w]
    kinds = f"{words[0]} sizes" if words[0] == words[1] else " and ".join(sides)
    return f"{kinds} ({size[0]} x {size[1]})"


def pairs(smallest: int) -> Iterator[tuple[int, int]]:
    """(H, W) with H < W and sides from `smallest` to twice that, in the order of their sums."""
    sides = range(smallest, 2 * smallest + 1)
    return (p for p in sorted(itertools.product(sides, sides), key=sum) if p[0] < p[1])
