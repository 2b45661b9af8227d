"""Data sets, transforms and loaders: scikit-learn's digits or a folder of images."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from torch_ref.arguments import (
    Factor,
    Fraction,
    Limits,
    NonNegative,
    PositiveCount,
    Probability,
)
from torch_ref.image_folder import list_folder, open_image

SPLITS = ("train", "validation", "test")
Size = Annotated[int, Limits(1, 4096)]  # pixels
MEASURED = 50_000  # images at most that mean and standard deviation are taken from


@dataclasses.dataclass
class Images(Dataset):
    """Images, read when they are asked for, and their classes [N]."""

    items: np.ndarray  # uint8 [N, H, W], or file names [N]
    labels: np.ndarray
    transform: Callable[[Image.Image], torch.Tensor] | None = None
    exif_transpose: bool = False  # of files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        item = self.items[index]
        if isinstance(item, np.ndarray):
            image = Image.fromarray(item)
        else:
            image = open_image(item, exif_transpose=self.exif_transpose)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def subset(self, indices: np.ndarray) -> "Images":
        return dataclasses.replace(self, items=self.items[indices], labels=self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run needs to know of its data."""

    splits: dict[str, Images]
    """"train", and "validation" and "test" where there are any: without augmentation."""

    augmented: Images
    """"train" as the training sees it."""

    class_names: list[str]
    image_size: int
    num_channels: int


def load_data(
    augment: dict | None = None,
    smallest: int = 1,
    dtype: torch.dtype = torch.float32,
    *,
    dataset: str = "digits",
    image_size: Size | None = None,
    resize_size: Size | None = None,
    grayscale: bool = False,
    validation_fraction: Fraction = 0.1,
    test_fraction: Fraction = 0.2,
    split_seed: Annotated[int, Limits(0, 2**32, without=(2**32,))] = 0,
    train_images: PositiveCount | None = None,
    eval_images: PositiveCount | None = None,
    exif_transpose: bool = False,
    mean: tuple[Probability, ...] | None = None,
    std: tuple[Factor, ...] | None = None,
) -> Data:
    """The splits of a data set, ready for a `loader`.

    Args:
      augment: arguments of `augmented_transform`.
      smallest: pixels to which smaller images are enlarged where image_size is left out.
      dtype: of the images; a narrower type is the business of autocast.
      dataset: digits | folder:DIR.
      image_size: left out: that of the first image if square and at most 64 pixels, else 224.
      resize_size: of the shorter side before the centre crop; left out: image_size.
      validation_fraction, test_fraction: stratified shares for the splits the set does not have.
      train_images, eval_images: use at most so many of the training and of each other split.
      exif_transpose: turn files upright by their EXIF orientation, as torchvision does not.
      mean, std: per channel, of images in [0, 1]; left out: measured on the training split.
    """
    if (mean is None) != (std is None):
        raise ValueError("mean and std are given together or not at all")
    splits, class_names = read_dataset(dataset)
    splits = {k: dataclasses.replace(v, exif_transpose=exif_transpose) for k, v in splits.items()}
    splits = hold_out(splits, "test", test_fraction, split_seed)
    splits = hold_out(splits, "validation", validation_fraction, split_seed)
    splits = {name: splits[name] for name in SPLITS if name in splits}  # in this order
    for name, split in splits.items():
        count = train_images if name == "train" else eval_images
        if count and count < len(split):
            splits[name] = limited(split, count, split_seed)
    image_size = image_size or max(smallest, natural_size(splits["train"]))
    resize_size = resize_size or image_size
    if resize_size < image_size:
        raise ValueError(f"resize_size {resize_size} is smaller than image_size {image_size}")
    num_channels = 1 if grayscale or is_gray(splits["train"]) else 3
    colour = v2.Grayscale() if num_channels == 1 else v2.RGB()
    crop = [colour, v2.Resize(resize_size), v2.CenterCrop(image_size), v2.PILToTensor()]
    if mean is None:
        mean, std = measure(dataclasses.replace(splits["train"], transform=v2.Compose(crop)))
    for name, values in (("mean", mean), ("std", std)):  # torch would repeat a single one
        if len(values) != num_channels:
            raise ValueError(f"{name} has {len(values)} values, the images {num_channels} channels")
    finish = [v2.ToDtype(dtype, scale=True), v2.Normalize(mean, std)]
    for split in splits.values():
        split.transform = v2.Compose(crop + finish)
    transform = augmented_transform(crop, finish, image_size, **(augment or {}))
    augmented = dataclasses.replace(splits["train"], transform=transform)
    return Data(splits, augmented, class_names, image_size, num_channels)


def augmented_transform(
    crop: list,
    finish: list,
    image_size: int,
    *,
    random_resized_crop: bool = False,
    random_crop: Annotated[int, Limits(0, 512)] | None = None,
    horizontal_flip: Probability = 0.0,
    rotation: Annotated[float, Limits(0, 180)] = 0.0,
    brightness: NonNegative = 0.0,
    contrast: NonNegative = 0.0,
    saturation: NonNegative = 0.0,
    hue: Annotated[float, Limits(0, 0.5)] = 0.0,
    random_erasing: Probability = 0.0,
) -> v2.Transform:
    """The transform of training images; every step is torchvision's own.

    Args:
      crop, finish: the steps of the plain transform, between which these go.
      random_crop: black pixels to pad with on each side before cropping back at random; left
        out, an eighth of the image size, or 0 with random_resized_crop.
      horizontal_flip, random_erasing: probabilities.
      rotation: largest angle in degrees.
      brightness, contrast, saturation, hue: of the colour jitter.
    """
    steps = list(crop)
    if random_resized_crop:
        steps[1:3] = [v2.RandomResizedCrop(image_size)]
    if random_crop is None:
        random_crop = 0 if random_resized_crop else image_size // 8
    if random_crop:
        steps.append(v2.RandomCrop(image_size, padding=random_crop))
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if rotation:
        steps.append(v2.RandomRotation(rotation, InterpolationMode.BILINEAR))
    if brightness or contrast or saturation or hue:
        steps.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    steps += finish
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing))
    return v2.Compose(steps)


def loader(images: Images, batch_size: int, *, seed: int | None = None, num_workers: int = 0):
    """Batches; with a seed they are shuffled and the remainder of an epoch is dropped."""
    train = seed is not None
    return DataLoader(
        images,
        batch_size,
        shuffle=train,
        drop_last=train,
        generator=torch.Generator().manual_seed(seed) if train else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def read_dataset(name: str) -> tuple[dict[str, Images], list[str]]:
    scheme, _, place = name.partition(":")
    if name == "digits":
        digits = load_digits()
        images = np.rint(digits.images * 255 / 16).astype(np.uint8)  # 17 levels -> 0 to 255
        return {"train": Images(images, digits.target)}, [str(n) for n in digits.target_names]
    if scheme == "folder" and place:
        return read_folder(Path(place))
    raise ValueError(f"dataset {name!r} is neither digits nor folder:DIR")


def read_folder(root: Path) -> tuple[dict[str, Images], list[str]]:
    listed, class_names = list_folder(root)
    splits = {name: with_labels(classes) for name, classes in listed.items()}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")  # the only held-out folder is the test split
    return splits, class_names


def with_labels(classes: list[list[str]]) -> Images:
    """The image files of each class, as one split."""
    paths = np.array([path for paths in classes for path in paths])
    return Images(paths, np.repeat(np.arange(len(classes)), [len(paths) for paths in classes]))


def hold_out(splits: dict, name: str, fraction: float, seed: int) -> dict[str, Images]:
    """`splits` with a split `name`, taken from "train" if there is none yet."""
    if name in splits:
        return splits
    if not fraction:
        if name == "test":
            raise ValueError("test_fraction 0 leaves nothing for the test; the set has no test")
        return splits
    train = splits["train"]
    rest, held_out = train_test_split(
        np.arange(len(train)), test_size=fraction, stratify=train.labels, random_state=seed
    )
    if len(np.unique(train.labels[rest])) < len(np.unique(train.labels)):
        raise ValueError(f"{name}_fraction {fraction} leaves no image of a class for the training")
    return splits | {"train": train.subset(np.sort(rest)), name: train.subset(np.sort(held_out))}


def limited(images: Images, count: int, seed: int) -> Images:
    """`count` of the images, the classes in proportion where that is enough for every class."""
    everything = np.arange(len(images))
    classes, sizes = np.unique(images.labels, return_counts=True)
    if min(count, len(images) - count) >= len(classes) and sizes.min() > 1:
        chosen, _ = train_test_split(
            everything, train_size=count, stratify=images.labels, random_state=seed
        )
    else:
        chosen = np.random.default_rng(seed).choice(everything, count, replace=False)
    return images.subset(np.sort(chosen))


def power_sums(image: torch.Tensor) -> np.ndarray:
    """uint8 `[C, H, W]` -> number, sum and sum of squares of the pixels in [0, 1], `[3, C]`."""
    pixels = image.flatten(1).double() / 255
    return torch.stack([torch.ones_like(pixels), pixels, pixels.square()]).sum(2).numpy()


def natural_size(images: Images) -> int:
    width, height = images[0][0].size
    return width if width == height <= 64 else 224


def is_gray(images: Images) -> bool:
    """Whether they are arrays without channels; files have three, whatever they show."""
    return isinstance(images.items[0], np.ndarray)


def measure(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of images in [0, 1]; of more than MEASURED
    images, of so many, evenly spaced."""
    numbers = np.linspace(0, len(images) - 1, min(len(images), MEASURED)).astype(int)
    with ThreadPoolExecutor() as pool:
        sums = np.sum(list(pool.map(lambda number: power_sums(images[number][0]), numbers)), 0)
    count, total, squares = torch.from_numpy(sums)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    if not (std > 1e-6).all():
        raise ValueError("a channel of the training images is constant; give mean and std")
    return mean.tolist(), std.tolist()
