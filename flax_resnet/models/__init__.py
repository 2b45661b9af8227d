"""The 16 networks by name."""

import numbers
from typing import get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flax_resnet.config import (
    WITH_SHORTCUTS,
    WITH_STEMS,
    Architecture,
    Kernels,
    ModelConfig,
    check_shortcut,
    check_stem,
    nearest,
)
from flax_resnet.errors import InputError
from flax_resnet.models import layers
from flax_resnet.models.cnn import BasicCNN
from flax_resnet.models.resnet import CONSTRUCTORS

MOST = 1_000_000
"""Largest `num_classes`, `in_channels` and `batch_norm_images`."""

_CHOICES = {"kernels": get_args(Kernels), "precision": tuple(layers.PRECISIONS)}


def list_models() -> list[str]:
    """Return the names that `create_model` takes.

    Examples:
      >>> len(flax_resnet.list_models())
      16
    """
    return list(get_args(Architecture))


def create_model(
    arch: str,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    stem: str | None = None,
    dropout: float = 0.0,
    zero_init_residual: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    bn_axis_name: str | None = None,
    rngs: nnx.Rngs | None = None,
    shortcut: str | None = None,
    kernels: str = "auto",
    precision: str = "default",
    stochastic_depth: float = 0.0,
    batch_norm_images: int | None = None,
    remat: bool = False,
) -> nnx.Module:
    """Make a network with random weights in training mode: `[B, H, W, C]` -> `[B, num_classes]`.

    Args:
      arch: one of `list_models()`.
      num_classes: number of logits for each image.
      in_channels: number of channels of the images.
      stem: the first layers of torchvision's ten networks, "imagenet" (the default: 7x7 stride 2,
        max-pool) or "cifar" (3x3 stride 1, no pool).
      dropout: probability of dropping a feature before the last linear layer.
      zero_init_residual: set the scale of the last BatchNorm of every residual block to zero.
      dtype: type of the computation. None takes the common type of images and parameters.
      param_dtype: type of parameters and running statistics.
      bn_axis_name: axis of a pmap or shard_map whose devices share BatchNorm's statistics.
      rngs: random numbers for the weights; None takes `nnx.Rngs(0)`.
      shortcut: the shortcuts of He's five networks where channels are added, "pad" (the default:
        zeros, option A) or "projection" (1x1 convolution and BatchNorm, option B).
      kernels: "auto" (own code for some operations on platforms where it is faster) or "library".
      precision: digits of float32 products on a GPU or TPU: "default" (as PyTorch there: TF32 for
        convolutions, all digits for linear layers), "tf32" (for both) or "highest" (all digits).
      stochastic_depth: probability that the last block drops its branch; it rises linearly from 0.
      batch_norm_images: images that share BatchNorm's statistics in training; None takes the batch.
      remat: compute residual blocks again in the backward pass; only their inputs are kept for it.

    Raises:
      InputError: a name is unknown, a type is wrong, or a number is out of range.

    Examples:
      >>> flax_resnet.create_model("resnet18", 3, stem="cifar")(jnp.zeros((1, 32, 32, 3))).shape
      (1, 3)
    """
    _check_names(arch, stem, shortcut, kernels=kernels, precision=precision)
    options = dict(num_classes=num_classes, in_channels=in_channels, dropout=dropout)
    options |= dict(kernels=kernels, precision=precision, dtype=dtype, param_dtype=param_dtype)
    options |= dict(rngs=nnx.Rngs(0) if rngs is None else rngs)
    residual = dict(zero_init_residual=zero_init_residual, stochastic_depth=stochastic_depth)
    residual |= dict(batch_norm_images=batch_norm_images, remat=remat)
    _check_values(options | residual)
    if arch == "basic_cnn":
        return _basic_cnn(options, residual)
    options |= residual | _choices(arch, stem, shortcut)
    return layers.named(CONSTRUCTORS[arch](bn_axis_name=bn_axis_name, **options))


def _choices(arch: str, stem: str | None, shortcut: str | None) -> dict:
    """The arguments of a constructor that only some networks take."""
    found = {"stem": stem or "imagenet"} if arch in WITH_STEMS else {}
    if arch in WITH_SHORTCUTS:
        found["projection"] = shortcut == "projection"
    return found


def _basic_cnn(options: dict, residual: dict) -> nnx.Module:
    for name, value in residual.items():
        if value:
            lacks = "BatchNorm" if name == "batch_norm_images" else "residual blocks"
            raise InputError(f"`{name}`: basic_cnn has no {lacks}")
    return layers.named(BasicCNN(**options))


def _check_names(arch: str, stem: str | None, shortcut: str | None, **choices: str):
    if arch not in list_models():
        raise InputError(f"unknown architecture {arch!r}{nearest(arch, list_models())}")
    check_stem(arch, stem)
    check_shortcut(arch, shortcut)
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            raise InputError(f"unknown `{name}` {value!r}{nearest(value, _CHOICES[name])}")


def _check_values(given: dict):
    if given["batch_norm_images"] is None:
        given = given | {"batch_norm_images": 1}
    for name in ("num_classes", "in_channels", "batch_norm_images"):
        value = given[name]
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (whole and 1 <= value <= MOST):
            raise InputError(f"`{name}` is a whole number from 1 to {MOST:,}, got {value!r:.80}")
    for name in ("dropout", "stochastic_depth"):
        if not (isinstance(given[name], numbers.Real) and 0 <= given[name] < 1):
            raise InputError(f"`{name}` {given[name]!r:.80} is not in [0, 1)")
    for name in ("dtype", "param_dtype"):
        if not _is_float(given[name]):
            raise InputError(f"`{name}` is a floating-point type, got {given[name]!r:.80}")


def _is_float(dtype) -> bool:
    try:
        return dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


_COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def create_from_config(
    config: ModelConfig, *, in_channels: int, seed: int = 0, bn_axis_name: str | None = None
) -> nnx.Module:
    """`create_model` with the fields of a config whose `num_classes` is filled in."""
    return create_model(
        config.arch,
        config.num_classes,
        in_channels=in_channels,
        stem=config.stem,
        dropout=config.dropout,
        zero_init_residual=config.zero_init_residual,
        dtype=_COMPUTE_DTYPES[config.dtype],
        param_dtype=jnp.float64 if config.dtype == "float64" else jnp.float32,
        bn_axis_name=bn_axis_name,
        rngs=nnx.Rngs(seed),
        shortcut=config.shortcut,
        kernels=config.kernels,
        precision=config.precision,
        stochastic_depth=config.stochastic_depth,
        batch_norm_images=config.batch_norm_images,
        remat=config.remat,
    )
