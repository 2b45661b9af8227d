"""Image sizes at which a wrong padding of a strided layer changes the output.

With a window of 3 and a stride of 2, "SAME" padding equals one pixel on every side at odd sizes. At
even sizes, a missing pixel at the end is never read. So every axis with a stride must see a size at
which the last window ends with the padded image, and one at which a pixel more makes a window more.
Images of height H and width W do not suffice, but with those of height W and width H they do.
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

    rests: tuple[int, int]
    """Pixels behind the last window; of an adaptive pool, those behind windows of one size."""

    kind: str = "window"
    """"window", "adaptive", or "patches": the stride is the window, and nothing is padded."""


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
            name = (self.modules and self.modules[-1]) or NAMES[function.overloadpacket.__name__]
            again = sum(key.split(":")[0] == name for key in self.found)
            self.found[f"{name}:{again + 1}" if again else name] = layer
        return function(*args, **(kwargs or {}))


def _layer(operation: str, args) -> Layer | None:
    """The layer of a call of one of PyTorch's operations; None if no padding can hide in it."""
    if operation not in NAMES or args[0].ndim != 4 or (operation == "convolution" and args[6]):
        return None  # args[6]: the convolution is transposed
    size = tuple(args[0].shape[2:])
    if NAMES[operation].startswith("adaptive"):
        return Layer(size, tuple(args[1]), _rests(size, args[1], (0, 0)), "adaptive")
    if operation == "convolution":
        window, stride, padding, dilation = args[1].shape[2:], args[3], args[4], args[5]
    else:
        window, stride, padding = (*args[1:4], [], [])[:3]
        stride, padding, dilation = stride or window, padding or [0], [1]
    window, stride, padding, dilation = map(_pair, (window, stride, padding, dilation))
    if max(window) == 1 or max(stride) == 1:
        return None
    reach = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, window, padding, strict=True)]
    patches = window == stride and not any(padding)
    return Layer(size, stride, _rests(size, stride, reach), "patches" if patches else "window")


NAMES = {
    "convolution": "conv2d",
    "max_pool2d_with_indices": "max_pool2d",
    "avg_pool2d": "avg_pool2d",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "adaptive_max_pool2d": "adaptive_max_pool2d",
}
"""{operation: what a user calls it}."""


def _rests(size, divisors, reach) -> tuple[int, int]:
    rests = ((n - r) % d for n, d, r in zip(size, divisors, reach, strict=True))
    height, width = rests
    return height, width


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
        if layer.kind != "window" and any(words):
            others = _padded(layer, sizes[0])
            if any(layers(net, s, channels) is None or not takes(s) for s in others):
                continue  # not silent: where padding changes something, a network raises
        if any(words):
            sentences.append(f"{name} sees only {_described(words, layer.size)}")
    return sentences


def _missing(calls: list[Layer]) -> list[str]:
    """Returns for each axis the one kind of sizes that a layer sees, or "" if they suffice."""
    first = calls[0]
    seen = [{call.rests[axis] for call in calls} for axis in (0, 1)]
    if len(calls) == 1:
        axes = zip(first.rests, first.divisors, strict=True)
        seen = 2 * [{rest for rest, divisor in axes if divisor > 1}]
    words = []
    for axis, divisor in enumerate(first.divisors):
        word = "divisible" if first.kind == "adaptive" else UNSEEN
        word = ("even", "odd")[first.size[axis] % 2] if divisor == 2 else word
        words.append("" if divisor == 1 or _shows(first, divisor, seen[axis]) else word)
    return words


UNSEEN = "at which a pixel of padding does not show"


def _shows(layer: Layer, stride: int, rests: set[int]) -> bool:
    """True if a pixel more behind the image, and one less if any is padded, changes the output; or
    if windows of one size could not replace an adaptive pool."""
    if layer.kind == "adaptive":
        return bool(rests - {0})
    return stride - 1 in rests and (layer.kind == "patches" or 0 in rests)


def _padded(layer: Layer, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of images at which a layer sees a pixel more, and more patches."""
    pixel = [-(-pixels // own) for pixels, own in zip(size, layer.size, strict=True)]
    return [(size[0] + pixel[0], size[1] + pixel[1]), (2 * size[0], 2 * size[1])]


def _described(words: list[str], size: tuple[int, int]) -> str:
    """The kinds of heights and widths as text, for example "even sizes (12 x 14)"."""
    sides = zip(words, ("heights", "widths"), strict=True)
    sides = [(words[0], "sizes")] if words[0] == words[1] else [pair for pair in sides if pair[0]]
    kinds = (f"{side} {word}" if word == UNSEEN else f"{word} {side}" for word, side in sides)
    return f"{' and '.join(kinds)} ({size[0]} x {size[1]})"


def pairs(smallest: int) -> Iterator[tuple[int, int]]:
    """(H, W) with H < W and sides from `smallest` to twice that, in the order of their sums."""
    sides = range(smallest, 2 * smallest + 1)
    return (p for p in sorted(itertools.product(sides, sides), key=sum) if p[0] < p[1])
