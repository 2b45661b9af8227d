"""Static int8 quantisation of a network by PyTorch, for the table of programs that serve it."""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx


def quantized(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy with int8 weights, one scale for each channel, and uint8 activations: PyTorch's own
    choice for x86 processors. BatchNorm and ReLU go into the convolutions.

    Args:
      net: in evaluation mode.
      batches: normalised images `[B, C, H, W]`, from which the ranges of the activations come.
    """
    first, *others = batches
    prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), (first,))
    with torch.inference_mode():
        for images in (first, *others):
            prepared(images)
    return convert_fx(prepared)


def load(path: Path, net: nn.Module, images: Tensor) -> nn.Module:
    """The quantised `net` with the weights and ranges that `torch.save` wrote to a file.

    Args:
      images: any batch of the right shape.
    """
    found = quantized(net, [images])
    found.load_state_dict(torch.load(path, weights_only=True))
    return found
