"""Random-access sources of images and labels: a data set before order, size and batches."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Protocol

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flax_resnet.config import DataConfig, InputError
from flax_resnet.data import cifar10
from flax_resnet.data.image_files import (
    bad_images,
    decode_image,
    list_splits,
    read_image,
)


class Source(Protocol):
    labels: np.ndarray
    """int32 [N]."""

    names: Sequence[str] | None
    """File names for messages, where there are any."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [H, W, C], C = 1 or 3, at its own size."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory: uint8 [N, H, W, C]."""

    images: np.ndarray
    labels: np.ndarray
    names: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files, each decoded when it is asked for."""

    paths: tuple[str, ...]
    labels: np.ndarray
    channels: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index], self.channels)


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """A prepared TFDS split, whose `records[i]["image"]` is an encoded image."""

    records: Sequence[dict]
    labels: np.ndarray
    channels: int
    name: str
    names: None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        encoded = io.BytesIO(self.records[int(index)]["image"])
        return decode_image(encoded, self.channels, name=f"{self.name}[{index}]")


@dataclass(frozen=True, eq=False)
class Subset:
    """The examples of a source at `indices` [M], in that order."""

    source: Source
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    @property
    def names(self) -> tuple[str, ...] | None:
        names = self.source.names
        return None if names is None else tuple(names[index] for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source[self.indices[index]]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    train: Source
    validation: Source
    """Empty where validation_fraction is 0 and the set has no such split of its own."""

    test: Source
    """Empty where test_fraction is 0 and the set has no such split of its own."""

    class_names: tuple[str, ...]
    channels: int
    bad_images: tuple[tuple[str, str], ...] = ()
    """(path, reason) of the files that were left out because they cannot be read."""

    ignored_files: int = 0
    """Number of files in class folders that are not named as images."""


def open_dataset(config: DataConfig) -> DataSet:
    """The splits of `config.dataset`. Where a set has a validation split but no test split, the
    former is the test. What is then still missing is cut from the training images, stratified,
    the test first. Of what is left, at most `train_images` and `eval_images` are used.

    folder:DIR has either class folders directly in DIR, which is one split, or `DIR/train` and
    `DIR/test`, `DIR/val` (or `DIR/validation`), or one of these alone, which is then the test.

    Raises:
      InputError: data that is missing, unsafe, or too little to split. With
        on_bad_image="error" a broken file is not noticed here but when it is read.
    """
    scheme, _, place = config.dataset.partition(":")
    openers = {"digits": _digits, "folder": _folder, "cifar10": _cifar10, "tfds": _tfds}
    splits, facts = openers[scheme](place, config)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")

    train = splits["train"]
    for split in ("test", "validation"):
        if split not in splits:
            splits[split] = Subset(train, np.arange(0))
            if getattr(config, f"{split}_fraction"):
                train, splits[split] = _cut(train, config, f"{split}_fraction")
    splits["train"] = train
    limits = {"train": config.train_images}
    limits |= dict.fromkeys(("validation", "test"), config.eval_images)
    splits = {name: _limit(s, limits[name], config.split_seed) for name, s in splits.items()}
    return DataSet(**(splits | facts))


def _limit(source: Source, count: int | None, seed: int) -> Source:
    """At most `count` images, stratified where that is enough for every class."""
    if count is None or count >= len(source):
        return source
    everything = np.arange(len(source))
    try:
        chosen, _ = train_test_split(
            everything, train_size=count, stratify=source.labels, random_state=seed
        )
    except ValueError:
        chosen = np.random.default_rng(seed).choice(everything, count, replace=False)
    return Subset(source, np.sort(chosen))


def _cut(train: Source, config: DataConfig, field: str) -> tuple[Subset, Subset]:
    """What stays for training and what is cut off by a field of the config, both stratified."""
    value, total = getattr(config, field), len(train)
    classes, counts = np.unique(train.labels, return_counts=True)
    try:
        stay, off = train_test_split(
            np.arange(total), test_size=value, stratify=train.labels, random_state=config.split_seed
        )
    except ValueError:  # sklearn's words name its own arguments
        stay = off = np.arange(0)
    if len(np.unique(train.labels[stay])) < len(classes):
        raise InputError(
            f"{config.dataset}: {field} {value} cannot be stratified over {total} images of "
            f"{len(classes)} classes, the smallest of {counts.min()}: both sides need as many "
            "images as there are classes, and every class needs two and one that stays"
        )
    return Subset(train, np.sort(stay)), Subset(train, np.sort(off))


def _digits(_: str, config: DataConfig) -> tuple[dict, dict]:
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train = ArraySource(images, digits.target.astype(np.int32))
    return {"train": train}, {"class_names": tuple("0123456789"), "channels": 1}


def _cifar10(place: str, config: DataConfig) -> tuple[dict, dict]:
    train, test, class_names = cifar10.read(place)
    if config.grayscale:
        train, test = ((_gray(images), labels) for images, labels in (train, test))
    splits = {"train": ArraySource(*train), "test": ArraySource(*test)}
    return splits, {"class_names": class_names, "channels": 1 if config.grayscale else 3}


def _gray(images: np.ndarray) -> np.ndarray:
    """[N, H, W, 3] -> [N, H, W, 1], as one tall image."""
    tall = Image.fromarray(images.reshape(-1, *images.shape[2:]))
    return np.asarray(tall.convert("L")).reshape(*images.shape[:3], 1)


def _folder(place: str, config: DataConfig) -> tuple[dict, dict]:
    root, channels = Path(os.path.expanduser(place)), 1 if config.grayscale else 3
    listings, ignored = list_splits(root)
    bad = {}
    if config.on_bad_image == "skip":
        folders = (paths for listing in listings.values() for paths in listing.values())
        bad = bad_images(list(chain.from_iterable(folders)), channels)
    splits = {
        split: _folder_source(root, split, listing, bad, channels)
        for split, listing in listings.items()
    }
    facts = {"class_names": tuple(listings["train"]), "channels": channels}
    return splits, facts | {"bad_images": tuple(bad.items()), "ignored_files": ignored}


def _folder_source(
    root: Path, split: str, listing: dict[str, list[str]], bad: dict[str, str], channels: int
) -> FolderSource:
    paths, labels = [], []
    for label, (name, files) in enumerate(listing.items()):
        good = [file for file in files if file not in bad]
        if not good:
            why = f"none of {len(files)} images can be read" if files else "no image"
            raise InputError(
                f"folder:{root}: {why} in class {name} of {split}; add some or remove the class"
            )
        paths += good
        labels += [label] * len(good)
    return FolderSource(tuple(paths), np.array(labels, np.int32), channels)


def _tfds(name: str, config: DataConfig) -> tuple[dict, dict]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(
            f"tfds:{name} needs tensorflow-datasets: `uv run --extra tfds ...`, or "
            '`pip install -e ".[tfds]"`'
        ) from None
    builder = _prepared(tfds, name)
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise InputError(
            f"tfds:{name}: no image classification set: it has the features "
            f"{', '.join(sorted(features))}, and needs image (Image) and label (ClassLabel)"
        )
    channels = 1 if config.grayscale or features["image"].shape[-1] == 1 else 3
    splits = {}
    for split in sorted({"train", "validation", "test"} & set(builder.info.splits)):
        source = _tfds_source(tfds, builder, split, channels)
        if len(source) and source.labels.min() >= 0:  # unlabelled test splits say -1
            splits[split] = source
    if "train" not in splits:
        raise InputError(f"tfds:{name}: no train split among {', '.join(builder.info.splits)}")
    label = features["label"]
    class_names = tuple(map(label.int2str, range(label.num_classes)))
    return splits, {"class_names": class_names, "channels": channels}


def _prepared(tfds, name: str):
    """The builder of a set that lies ready for random access; prepares it where TFDS can."""
    builder = None
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
        builder.download_and_prepare(file_format="array_record")
        builder.as_data_source(next(iter(builder.info.splits)))
        return builder
    except Exception as error:  # whatever a builder's own code raises
        reason = shorten(str(error) or repr(error), 200, placeholder=" ...")
    command = f"uv run --extra tfds --with tensorflow tfds build {name} --file_format=array_record"
    if builder and builder.is_prepared():  # in a format that has no random access
        command += " --data_dir=NEW_FOLDER, and set TFDS_DATA_DIR=NEW_FOLDER"
    raise InputError(f"tfds:{name}: {reason}; prepare it with: {command}")


def _tfds_source(tfds, builder, split: str, channels: int) -> TfdsSource:
    # Encoded images are kept: TFDS's own decoder gives gray JPEGs the wrong shape.
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split, decoders=decoders)
    labels = [records[index]["label"] for index in range(len(records))]
    name = f"tfds:{builder.info.full_name}/{split}"
    return TfdsSource(records, np.array(labels, np.int32), channels, name)
