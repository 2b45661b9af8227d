"""A network in evaluation mode <-> .onnx: written by torch.onnx, run by ONNX Runtime."""

import copy
import json
import os
from collections.abc import Callable

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401, which torch.onnx needs and does not ask for
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval


def save(
    path: str | os.PathLike, net: nn.Module, image_shape: tuple[int, int, int], notes: dict
) -> None:
    """Writes images float32 [B, C, H, W], normalised -> logits [B, K], for any B.

    Args:
      image_shape: (C, H, W).
      notes: kept in the file, each value as JSON.
    """
    images = torch.zeros(2, *image_shape)
    program = torch.onnx.export(
        net.eval(),
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    texts = {name: json.dumps(value, allow_nan=False) for name, value in notes.items()}
    program.model.metadata_props.update(texts)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose source it came from
    program.save(path, external_data=False)


def load(path: str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """The saved network as a function on the CPU: images [B, C, H, W] -> logits [B, K]."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def fold_batchnorm(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose convolutions do the work of the BatchNorms behind them."""
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        names = [(n.replace("bn", "conv"), n) for n, _ in module.named_children() if "bn" in n]
        if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.BatchNorm2d):
            names = [("0", "1")]  # a projection
        for convolution, norm in names:
            fused = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
            setattr(module, convolution, fused)
            setattr(module, norm, nn.Identity())
    return net
