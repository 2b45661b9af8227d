"""Data sets before size and batches: scikit-learn's digits or a folder of images, in splits."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch.utils.data import Dataset

from flax_resnet.config import DataConfig
from flax_resnet.errors import InputError
from torch_ref.folders import list_splits
from torch_ref.image_files import read_image


@dataclasses.dataclass(frozen=True)
class Images(Dataset):
    """Images, read when they are asked for, and their classes [N]."""

    items: np.ndarray  # uint8 [N, H, W], or file names [N]
    labels: np.ndarray
    transform: Callable[[Image.Image], torch.Tensor] | None = None
    exif_transpose: bool = False  # of files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.image(index)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """The image `index`, at its own size."""
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_image(item, exif_transpose=self.exif_transpose)

    def subset(self, indices: np.ndarray) -> "Images":
        """The images at `indices`, in the order of the whole."""
        indices = np.sort(indices)
        return dataclasses.replace(self, items=self.items[indices], labels=self.labels[indices])


@dataclasses.dataclass(frozen=True)
class DataSet:
    splits: dict[str, Images]
    """"train", "test", and "validation" unless validation_fraction is 0 and the set has none."""

    class_names: tuple[str, ...]
    channels: int

    def contents(self) -> list:
        """The class names, and a digest of the labels, names and some files of each split."""
        found = [list(self.class_names)]
        opened = {k: images for k, images in self.splits.items() if isinstance(images, Images)}
        for split, images in opened.items():
            digest = hashlib.sha256(np.asarray(images.labels, np.int32).tobytes())
            if images.items.ndim == 1:
                digest.update(b"/".join(os.fsencode(Path(name).name) for name in images.items))
                for number in np.linspace(0, len(images) - 1, min(len(images), 64)).astype(int):
                    digest.update(Path(images.items[number]).read_bytes())
            found.append([split, digest.hexdigest()])
        return found


def open_dataset(config: DataConfig) -> DataSet:
    """The splits of `config.dataset`, as `flax_resnet.data.sources.open_dataset` defines them.

    Raises:
      InputError: another kind of data set, or one that is missing or too little to split.
    """
    scheme, _, place = config.dataset.partition(":")
    openers = {"digits": _digits, "folder": _folder}
    if scheme not in openers:
        raise InputError(
            f"`dataset` {config.dataset!r}: torch_ref reads digits and folder:DIR only"
        )
    dataset = openers[scheme](place, config)
    splits = dict(dataset.splits)
    if config.folds:
        splits["train"], splits["test"] = _fold(splits["train"], config, dataset.class_names)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")  # the only held-out folder is the test split
    fractions = {"test": config.test_fraction, "validation": config.validation_fraction}
    for name, value in fractions.items():
        if name not in splits and value:
            cut = _cut(splits["train"], f"{name}_fraction", value, config.split_seed)
            splits["train"], splits[name] = cut
    if "test" not in splits:
        raise InputError("`test_fraction` 0 leaves nothing for the test; the set has no test")
    limits = {"train": config.train_images}
    limits |= dict.fromkeys(("validation", "test"), config.eval_images)
    splits = {k: _limit(splits[k], n, config.split_seed) for k, n in limits.items() if k in splits}
    return dataclasses.replace(dataset, splits=splits)


def _limit(images: Images, count: int | None, seed: int) -> Images:
    """At most `count`, the classes in proportion where that is enough for every class."""
    if count is None or count >= len(images):
        return images
    everything = np.arange(len(images))
    classes, sizes = np.unique(images.labels, return_counts=True)
    if min(count, len(images) - count) >= len(classes) and sizes.min() > 1:
        chosen, _ = train_test_split(
            everything, train_size=count, stratify=images.labels, random_state=seed
        )
    else:
        chosen = np.random.default_rng(seed).choice(everything, count, replace=False)
    return images.subset(chosen)


def _cut(train: Images, field: str, value: float, seed: int) -> tuple[Images, Images]:
    """Split off the share that a config field asks for, stratified: (the rest, the share)."""
    everything = np.arange(len(train))
    try:
        stay, off = train_test_split(
            everything, test_size=value, stratify=train.labels, random_state=seed
        )
    except ValueError as error:  # too few images of a class
        raise InputError(f"`{field}` {value}: {error}") from None
    if len(np.unique(train.labels[stay])) < len(np.unique(train.labels)):
        raise InputError(f"`{field}` {value} leaves no image of a class for the training")
    return train.subset(stay), train.subset(off)


def _fold(train: Images, config: DataConfig, names: tuple[str, ...]) -> tuple[Images, Images]:
    """All folds but one, and that one."""
    classes, sizes = np.unique(train.labels, return_counts=True)
    if sizes.min() < config.folds:
        raise InputError(
            f"`folds` {config.folds} is more than the {sizes.min()} images of the smallest class"
            f" ({names[classes[sizes.argmin()]]})"
        )
    folds = StratifiedKFold(config.folds, shuffle=True, random_state=config.split_seed)
    stay, off = list(folds.split(train.labels, train.labels))[config.fold]
    return train.subset(stay), train.subset(off)


def _digits(_: str, config: DataConfig) -> DataSet:
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)  # 17 levels -> 0 to 255
    return DataSet({"train": Images(images, digits.target)}, tuple("0123456789"), 1)


def _folder(place: str, config: DataConfig) -> DataSet:
    splits = list_splits(Path(os.path.expanduser(place)))
    channels = 1 if config.grayscale else 3  # of files, whatever they show
    images = {
        name: _folder_images(list(classes.values()), config.exif_transpose)
        for name, classes in splits.items()
    }
    return DataSet(images, tuple(splits["train"]), channels)


def _folder_images(classes: list[list[str]], exif_transpose: bool) -> Images:
    """The image files of each class, as one split."""
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in classes])
    return Images(np.array(list(chain(*classes))), labels, exif_transpose=exif_transpose)
