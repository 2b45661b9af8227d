"""Images -> tensors of the size of the network, their statistics, and batches."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from torchvision.transforms import v2

from flax_resnet.config import AugmentConfig, DataConfig
from flax_resnet.errors import InputError
from torch_ref.sources import Images


def decode(
    config: DataConfig, channels: int, augment: AugmentConfig | None = None
) -> list[v2.Transform]:
    """The steps to uint8 `[C, S, S]`; the sizes of the config are filled in. A random crop needs
    the config of the augmentation."""
    method = v2.InterpolationMode(config.interpolation)
    crop = [v2.Resize(config.resize_size, method), v2.CenterCrop(config.image_size)]
    if augment and augment.random_resized_crop:
        bounds = augment.scale, augment.ratio
        crop = [v2.RandomResizedCrop(config.train_size or config.image_size, *bounds, method)]
    return [v2.Grayscale() if channels == 1 else v2.RGB(), *crop, v2.PILToTensor()]


def normalize(config: DataConfig, dtype: torch.dtype) -> list[v2.Transform]:
    """The steps from there to what the network takes."""
    return [v2.ToDtype(dtype, scale=True), v2.Normalize(config.mean, config.std)]


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of uint8 images taken as in [0, 1].

    Raises:
      InputError: a channel is constant.
    """
    with ThreadPoolExecutor() as pool:  # adds up as it goes: a list of all would hold their memory
        counts = sum(pool.map(lambda n: _count_levels(images[n][0]), range(len(images))))
    shares = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]).square()).sum(1).sqrt()
    if not (std > 1e-6).all():
        raise InputError("a channel of the training images is constant; give mean and std")
    return tuple(mean.tolist()), tuple(std.tolist())


def _count_levels(image: torch.Tensor) -> torch.Tensor:
    """uint8 `[C, H, W]` -> how often each value is in each channel, `[C, 256]`."""
    return torch.stack([torch.bincount(channel, minlength=256) for channel in image.flatten(1)])


class RepeatedSampler(Sampler):
    """torchvision's RASampler on one device: each image of a permutation several times, and no more
    images an epoch than without."""

    def __init__(self, count: int, repeats: int, generator: torch.Generator):
        self.count, self.repeats, self.generator = count, repeats, generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        order = torch.randperm(self.count, generator=self.generator)
        return iter(order.repeat_interleave(self.repeats)[: self.count].tolist())


def sampler(
    images: Images, generator: torch.Generator, *, balanced: bool = False, repeats: int = 1
) -> Sampler:
    """The order of the training images."""
    if not balanced:
        return RepeatedSampler(len(images), repeats, generator)
    shares = 1 / np.bincount(images.labels)[images.labels]
    return WeightedRandomSampler(shares.tolist(), len(images), generator=generator)


def loader(
    images: Images, batch_size: int, *, seed: int | None = None, num_workers: int = 0, **options
) -> DataLoader:
    """Batches; with a seed they are shuffled and the remainder of an epoch is dropped.

    Args:
      options: of `sampler`.
    """
    train = seed is not None
    generator = torch.Generator().manual_seed(seed) if train else None
    return DataLoader(
        images,
        batch_size,
        sampler=sampler(images, generator, **options) if train else None,
        drop_last=train,
        generator=generator,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
