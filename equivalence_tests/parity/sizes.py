"""Image sizes at which a wrong padding of a strided layer changes the output.

At odd sizes, "SAME" padding equals one pixel on every side. At even sizes, a missing pixel at the
end is never read. So the input of every strided layer must have one side that the stride divides
and one that it does not.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import nn

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def strided_calls(net: nn.Module, size: tuple[int, int], channels: int) -> dict:
    """Strides and input sizes of the strided layers of a network.

    Args:
      net: takes `[1, channels, H, W]`; runs in evaluation mode, without gradients.
      size: `(H, W)`.

    Returns:
      {name of a layer: (stride, (H, W) of its input)}; the second call of a layer is `name:2`.
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
    """Layers whose input sizes would hide a wrong padding, one sentence each; [] if none."""
    found = []
    for name, (stride, size) in calls.items():
        divided = {pixels % step == 0 for step, pixels in zip(stride, size, strict=True)}
        if len(divided) == 1:
            seen = "even" if divided == {True} else "odd"
            if max(stride) > 2:
                seen = "divisible" if seen == "even" else "indivisible"
            found.append(f"{name} sees only {seen} sizes ({size[0]} x {size[1]})")
    return found


def pairs(smallest: int) -> Iterator[tuple[int, int]]:
    """(H, W) with H < W and sides from `smallest` to twice that, in the order of their sums."""
    sides = range(smallest, 2 * smallest + 1)
    return (p for p in sorted(itertools.product(sides, sides), key=sum) if p[0] < p[1])


def _pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)
