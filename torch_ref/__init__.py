"""The ResNet trainer of flax_resnet in plain PyTorch: the reference it is compared with.

Of flax_resnet it takes the config, the errors and the flags, and nothing that computes.
"""

from torch import nn

from flax_resnet.config import WITH_STEMS, ModelConfig, check_shortcut, check_stem, nearest
from flax_resnet.errors import InputError
from torch_ref.cnn import BasicCNN
from torch_ref.grouped_norm import in_groups
from torch_ref.resnet import CONSTRUCTORS, projection

__all__ = ["create_model", "list_models"]


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return [*CONSTRUCTORS, "basic_cnn"]


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    stem: str | None = None,
    dropout: float = 0.0,
    zero_init_residual: bool = False,
    shortcut: str | None = None,
    stochastic_depth: float = 0.0,
    batch_norm_images: int | None = None,
) -> nn.Module:
    """A freshly initialised network from images [B, in_channels, H, W] to logits [B, num_classes].

    Args:
      name: one of `list_models()`.
      stem: "imagenet" (7x7 stride 2, max-pool; also None) or "cifar" (3x3 stride 1, no pool) for
        torchvision's ten; the other networks have their own and take None only.
      dropout: probability of dropping a feature before the last linear layer.
      zero_init_residual: start the last BatchNorm weight of each residual block at zero.
      shortcut: "pad" (option A: channels of zero; also None) or "projection" (option B: 1x1
        convolution and BatchNorm) for the CIFAR five; the other networks take None only.
      stochastic_depth: probability of dropping the last residual block's branch for an image; that
        of the others rises from 0 in equal steps.
      batch_norm_images: consecutive images that share BatchNorm's statistics in training; None: all
        of a batch.

    Raises:
      InputError: an unknown name, or a choice that the network does not have.
    """
    if name not in list_models():
        raise InputError(f"unknown model {name!r}{nearest(name, list_models())}")
    check_stem(name, stem)
    check_shortcut(name, shortcut)
    options = {"num_classes": num_classes, "in_channels": in_channels, "dropout": dropout}
    if name == "basic_cnn":
        if zero_init_residual:
            raise InputError("`zero_init_residual`: basic_cnn has no residual blocks")
        if stochastic_depth:
            raise InputError("`stochastic_depth`: basic_cnn has no residual blocks")
        if batch_norm_images:
            raise InputError("`batch_norm_images`: basic_cnn has no BatchNorm")
        return BasicCNN(**options)
    if name in WITH_STEMS:
        options["stem"] = stem or "imagenet"
    if shortcut == "projection":
        options["shortcut"] = projection
    options |= {"zero_init_residual": zero_init_residual, "stochastic_depth": stochastic_depth}
    model = CONSTRUCTORS[name](**options)
    return in_groups(model, batch_norm_images) if batch_norm_images else model


def create_from_config(config: ModelConfig, in_channels: int) -> nn.Module:
    """`create_model` with the fields of a config whose `num_classes` is filled in; parameters in
    float64 where the computation is."""
    model = create_model(
        config.arch,
        config.num_classes,
        in_channels,
        stem=config.stem,
        dropout=config.dropout,
        zero_init_residual=config.zero_init_residual,
        shortcut=config.shortcut,
        stochastic_depth=config.stochastic_depth,
        batch_norm_images=config.batch_norm_images,
    )
    return model.double() if config.dtype == "float64" else model
