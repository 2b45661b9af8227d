"""Image sizes at which a wrong padding of a strided layer cannot look right.

"SAME" padding equals one pixel on every side where the size is odd, and a missing pixel behind the
image is never read where it is even. So every layer with a stride has to see one size that its
stride divides and one that it does not.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def strided_calls(net: nn.Module, size: tuple[int, int], channels: int) -> dict:
    """What the strided layers of a network see of an image.

    Args:
      net: maps `[1, channels, H, W]` to anything; runs in evaluation mode, without gradients.
      size: `(H, W)`.

    Returns:
      {name of a layer, with its number where it is called again: (stride, (H, W) of its input)}.
    """
    calls = {}

    def note(module, inputs, name):
        again = sum(key.split(":")[0] == name for key in calls)
        key = f"{name}:{again + 1}" if again else name
        calls[key] = (_pair(module.stride), tuple(inputs[0].shape[2:]))

    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: note(m, x, name))
        for name, module in net.named_modules()
        if isinstance(module, _STRIDED) and max(_pair(module.kernel_size)) > 1
        if max(_pair(module.stride)) > 1
    ]
    training = net.training
    first = next(net.parameters())
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, channels, *size, dtype=first.dtype, device=first.device))
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return calls


def faults(calls: dict) -> list[str]:
    """The layers that see only sizes at which a wrong padding looks right; [] if none does."""
    found = []
    for name, (stride, size) in calls.items():
        divided = {pixels % step == 0 for step, pixels in zip(stride, size, strict=True)}
        if len(divided) == 1:
            seen = "even" if divided == {True} else "odd"
            if max(stride) > 2:
                seen = "divisible" if seen == "even" else "indivisible"
            found.append(f"{name} sees only {seen} sizes ({size[0]} x {size[1]})")
    return found


def sound_size(net: nn.Module, channels: int, smallest: int) -> tuple[int, int] | None:
    """The smallest `(H, W)` from `smallest` to twice as many pixels that has no faults."""
    for size in _pairs(smallest):
        if not faults(strided_calls(net, size, channels)):
            return size
    return None


def _pairs(smallest: int) -> Iterator[tuple[int, int]]:
    sides = range(smallest, 2 * smallest + 1)
    return (p for p in sorted(itertools.product(sides, sides), key=sum) if p[0] < p[1])


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
