"""A PyTorch network whose code asks for narrow floats runs in float64."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = (torch.float16, torch.bfloat16, torch.float32)

CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


class _Wide(TorchFunctionMode):
    """Calls PyTorch's functions with float64 in place of a narrower float."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function in CASTS else function
        args, kwargs = tree_map(_wider, (args, kwargs or {}))
        return function(*args, **kwargs)


def _wider(value):
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def widen(net: nn.Module):
    """Lets every forward pass of a network, and of its copies, run in float64."""
    entered = []

    def enter(module, inputs):
        entered.append(_Wide())
        entered[-1].__enter__()

    def leave(module, inputs, output):
        entered.pop().__exit__(None, None, None)

    net.register_forward_pre_hook(enter)
    net.register_forward_hook(leave, always_call=True)
