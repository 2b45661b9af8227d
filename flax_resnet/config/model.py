"""Settings of the network."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from flax_resnet.config.fields import BatchSize, Fraction, dataclass, nearest
from flax_resnet.errors import InputError

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2",
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
    "basic_cnn",
]  # fmt: skip

Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["pad", "projection"]
Kernels = Literal["auto", "library"]

WITH_STEMS = get_args(Architecture)[:10]
"""Torchvision's networks, which exist with both stems."""

WITH_SHORTCUTS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
"""The CIFAR networks of He et al. 2015, which exist with padded channels and with projections."""


def check_stem(arch: str, stem: str | None):
    """Raises InputError unless the network can be built with this stem; None is its default."""
    if stem is not None and arch not in WITH_STEMS:
        raise InputError(f"`stem` {stem!r}: {arch} has its own stem")
    if stem not in (None, *get_args(Stem)):
        raise InputError(f"unknown `stem` {stem!r}{nearest(stem, get_args(Stem))}")


def check_shortcut(arch: str, shortcut: str | None):
    """Raises InputError unless the network can be built with this shortcut; None is its default."""
    if shortcut is not None and arch not in WITH_SHORTCUTS:
        raise InputError(
            f"`shortcut` {shortcut!r}: {arch} has its own shortcut; {', '.join(WITH_SHORTCUTS)}"
            " have a choice"
        )
    if shortcut not in (None, *get_args(Shortcut)):
        raise InputError(f"unknown `shortcut` {shortcut!r}{nearest(shortcut, get_args(Shortcut))}")


@dataclass
class ModelConfig:
    arch: Architecture = "resnet18"
    """Name of the network."""

    stem: Stem | None = None
    """First layers of torchvision's ten networks: "imagenet" (7x7 stride 2, max-pool) or "cifar"
    (3x3 stride 1, no pool). Default: "cifar" for images of 17 to 63 pixels, else "imagenet"."""

    shortcut: Shortcut | None = None
    """Shortcuts where the number of channels changes, in He's five networks for CIFAR: "pad"
    (option A: channels of zeros) or "projection" (option B: 1x1 convolution and BatchNorm).
    Default: "pad"."""

    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Number of classes, which must be that of the data. Default: that of the data."""

    dropout: Fraction = 0.0
    """Probability of dropping a feature before the last linear layer."""

    stochastic_depth: Fraction = 0.0
    """Probability that the last residual block drops its branch for an image. The probabilities of
    the blocks before it rise from 0 in equal steps."""

    zero_init_residual: bool = False
    """Set the scale of the last BatchNorm of every residual block to zero at the start."""

    batch_norm_images: BatchSize | None = None
    """Number of consecutive images of a batch that share BatchNorm's statistics in training.
    Default: all images of the batch, over all devices."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the computation. Parameters are float64 with "float64", else float32."""

    precision: Literal["default", "tf32", "highest"] = "default"
    """Number of digits that products have on a GPU or TPU with `dtype` float32; on a CPU they have
    all digits. "default" is what PyTorch does on the same card: convolutions in TF32 on a GPU and
    in one bfloat16 pass on a TPU, linear layers with all digits. "tf32": both in TF32, or in three
    bfloat16 passes on a TPU. "highest": both with all digits."""

    kernels: Kernels = "auto"
    """Code that computes the layers: "auto" uses this project's own code (flax_resnet/kernels)
    where it is faster on the platform that the program is compiled for, "library" uses only
    operations of JAX and Flax."""

    remat: bool = False
    """Keep only the input of each residual block for the backward pass, which then computes the
    block's activations again (rematerialisation). A step needs less memory and more time; results
    are the same but for rounding."""

    def __post_init__(self):
        for name in ("remat", "zero_init_residual", "stochastic_depth"):
            if getattr(self, name) and self.arch == "basic_cnn":
                raise ValueError(f"`{name}`: basic_cnn has no residual blocks")
        if self.batch_norm_images and self.arch == "basic_cnn":
            raise ValueError("`batch_norm_images`: basic_cnn has no BatchNorm")
        check_stem(self.arch, self.stem)
        check_shortcut(self.arch, self.shortcut)
