"""Augmentation of training images; every step is torchvision's own."""

from torchvision.transforms import InterpolationMode, v2

from flax_resnet.config import AugmentConfig


def augment(config: AugmentConfig, image_size: int) -> list[v2.Transform]:
    """The steps between decoding and normalising; `random_crop` of the config is filled in."""
    steps = []
    if config.random_crop:
        steps.append(v2.RandomCrop(image_size, padding=config.random_crop))
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.rotation:
        steps.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR))
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    return steps


def erase(config: AugmentConfig) -> list[v2.Transform]:
    """The step after normalising."""
    return [v2.RandomErasing(config.random_erasing)] if config.random_erasing else []


def mixup(config: AugmentConfig, num_classes: int) -> v2.Transform | None:
    """The step on a whole batch of images and labels."""
    return v2.MixUp(alpha=config.mixup, num_classes=num_classes) if config.mixup else None
