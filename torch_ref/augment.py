"""Augmentation of training images; every step is torchvision's own."""

from collections.abc import Callable

from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from flax_resnet.config import AugmentConfig, DataConfig
from flax_resnet.errors import InputError


def augment(config: AugmentConfig, data: DataConfig) -> list[Callable]:
    """The steps between decoding and normalising; the sizes of the configs are filled in."""
    steps = []
    if config.random_crop:
        size = data.train_size if config.random_resized_crop else None
        steps.append(v2.RandomCrop(size or data.image_size, padding=config.random_crop))
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip))
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip(config.vertical_flip))
    if config.auto_augment:
        steps += [v2.ToPILImage(), auto_augment(config, data), v2.PILToTensor()]
    if config.rotation:
        steps.append(v2.RandomRotation(config.rotation, InterpolationMode.BILINEAR))
    jitter = (config.brightness, config.contrast, config.saturation, config.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    return steps


def auto_augment(config: AugmentConfig, data: DataConfig) -> Callable:
    """The policy of `auto_augment`, on images of Pillow.

    Raises:
      InputError: timm's policy without timm.
    """
    name, method = config.auto_augment, InterpolationMode(data.interpolation)
    if name == "ta_wide":
        return v2.TrivialAugmentWide(interpolation=method)
    if name == "ra":
        return v2.RandAugment(magnitude=config.ra_magnitude, interpolation=method)
    if name in ("imagenet", "cifar10"):
        return v2.AutoAugment(v2.AutoAugmentPolicy(name), interpolation=method)
    try:
        from timm.data.auto_augment import rand_augment_transform
    except ModuleNotFoundError as error:
        raise InputError(f"`auto_augment` {name} needs {error.name}: install timm") from None
    fill = tuple(min(255, round(255 * mean)) for mean in data.mean)
    method = Image.Resampling[data.interpolation.upper()]
    return rand_augment_transform(name, {"img_mean": fill, "interpolation": method})


def erase(config: AugmentConfig) -> list[v2.Transform]:
    """The step after normalising."""
    return [v2.RandomErasing(config.random_erasing)] if config.random_erasing else []


def mixup(config: AugmentConfig, num_classes: int) -> v2.Transform | None:
    """The step on a whole batch of images and labels; of MixUp and CutMix one by chance."""
    kinds = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    steps = [kind(alpha=a, num_classes=num_classes) for kind, a in kinds.items() if a]
    return v2.RandomChoice(steps) if steps else None
