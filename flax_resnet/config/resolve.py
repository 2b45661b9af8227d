"""Chooses what a config leaves open of sizes, stem and classes, once the data are known."""

from dataclasses import replace

from flax_resnet.config.model import WITH_STEMS, ModelConfig
from flax_resnet.config.train import TrainConfig
from flax_resnet.errors import InputError

SMALL = 64
"""Images up to so many pixels a side keep their size; smaller ones get the small stem."""

TINY = 16
"""Smaller images are enlarged to so many pixels a side for the large stem."""


def natural_size(height: int, width: int) -> int:
    """The pixels a side that the first training image, of this size, suggests."""
    return height if height == width <= SMALL else 224


def resolve(config: TrainConfig, *, image_size: int, num_classes: int) -> TrainConfig:
    """The config with its sizes, crop, stem and number of classes filled in.

    Args:
      image_size: the config's, else the pixels a side that the data suggest.
      num_classes: that of the data.

    Raises:
      InputError: the config contradicts itself or the data.
    """
    return _resolve_model(_resolve_sizes(config, image_size), num_classes)


def _resolve_sizes(config: TrainConfig, size: int) -> TrainConfig:
    data = config.data
    if data.image_size is None and _is_tiny(size, config.model):
        size = TINY
    if data.resize_size and data.resize_size < size:
        raise InputError(f"`resize_size` {data.resize_size} is smaller than the image size {size}")
    data = replace(data, image_size=size, resize_size=data.resize_size or size)
    augment = config.augment
    if augment.random_crop is None:
        padding = 0 if augment.random_resized_crop else size // 8
        augment = replace(augment, random_crop=padding)
    return replace(config, data=data, augment=augment)


def _is_tiny(size: int, model: ModelConfig) -> bool:
    """True if images are enlarged for the large stem. On the digits of 8 pixels this is four times
    cheaper than the small stem without enlargement, and more accurate in the same time."""
    return size < TINY and model.stem is None and model.arch in WITH_STEMS


def _resolve_model(config: TrainConfig, classes: int) -> TrainConfig:
    model = config.model
    if model.num_classes not in (None, classes):
        raise InputError(f"`num_classes` {model.num_classes}, but the data have {classes} classes")
    stem = model.stem
    if stem is None and model.arch in WITH_STEMS:
        stem = "cifar" if TINY < config.data.image_size < SMALL else "imagenet"
    return replace(config, model=replace(model, num_classes=classes, stem=stem))
