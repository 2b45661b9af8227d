"""The ResNet trainer of flax_resnet in plain PyTorch: the reference it is compared with."""

import difflib

from torch import nn

from torch_ref.cnn import BasicCNN
from torch_ref.resnet import CIFAR, CONSTRUCTORS, projection

__all__ = ["create_model", "list_models"]


def list_models() -> list[str]:
    return [*CONSTRUCTORS, "basic_cnn"]


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    stem: str | None = None,
    dropout: float = 0.0,
    zero_init_residual: bool = False,
    shortcut: str | None = None,
) -> nn.Module:
    """A freshly initialised net from images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
      name: one of `list_models()`.
      stem: "imagenet" (7x7 stride 2, max-pool; also None) or "cifar" (3x3 stride 1, no pool) for
        torchvision's ten; the other nets have their own and take None only.
      dropout: probability of dropping a feature before the last linear layer.
      zero_init_residual: start the last BatchNorm weight of each residual block at zero.
      shortcut: "pad" (option A: channels of zero; also None) or "projection" (option B: 1x1
        convolution and BatchNorm) for the CIFAR five; the other nets take None only.
    """
    if name not in list_models():
        nearest = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}, the nearest name is {nearest!r}")
    if stem is not None and (name in CIFAR or name == "basic_cnn"):
        raise ValueError(f"{name} has a stem of its own and takes no other, got {stem!r}")
    if stem not in (None, "imagenet", "cifar"):
        raise ValueError(f"stem {stem!r} is neither 'imagenet' nor 'cifar'")
    if shortcut is not None and name not in CIFAR:
        raise ValueError(f"{name} has a shortcut of its own and takes no other, got {shortcut!r}")
    if shortcut not in (None, "pad", "projection"):
        raise ValueError(f"shortcut {shortcut!r} is neither 'pad' nor 'projection'")
    options = {"num_classes": num_classes, "in_channels": in_channels, "dropout": dropout}
    if name == "basic_cnn":
        if zero_init_residual:
            raise ValueError("zero_init_residual: basic_cnn has no residual blocks")
        return BasicCNN(**options)
    if name not in CIFAR:
        options["stem"] = stem or "imagenet"
    if shortcut == "projection":
        options["shortcut"] = projection
    return CONSTRUCTORS[name](zero_init_residual=zero_init_residual, **options)
