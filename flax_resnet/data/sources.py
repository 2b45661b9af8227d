"""Data sets as random-access sources of images and labels, at their own sizes."""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol
from unicodedata import normalize

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from flax_resnet.config import DataConfig
from flax_resnet.data import cifar10, cuts, hugging_face, shards, tfds
from flax_resnet.data.folders import HIDDEN_FOLDER, STRAY, Listing, list_splits
from flax_resnet.data.image_files import bad_images, decode_image, is_turned, read_image
from flax_resnet.data.shared import Names, SharedArrays
from flax_resnet.errors import InputError
from flax_resnet.text import listed, most, printable

_LOOKED_AT = 300
"""Most images of a split whose EXIF orientation is read when a data set is opened."""

TURN = "--exif-transpose applies it"
AS_TRAINED = "the run was trained without --exif-transpose"

_NAMED = 20
"""Most lines about images that were left out."""


class Source(Protocol):
    """A sequence of images with labels."""

    labels: np.ndarray
    """Class of each image, int32 [N]."""

    names: Names | None
    """File names for messages, or None."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """An image, uint8 [H, W, C] with C = 1 or 3, at its own size."""

    def content(self, index: int) -> bytes:
        """The bytes of an image's file, or its pixels where it has none."""

    def turned(self, index: int) -> bool:
        """True if an image has an EXIF rotation that is not applied."""


@dataclass(frozen=True, eq=False)
class ArraySource(SharedArrays):
    """A source of images in memory, uint8 [N, H, W, C]."""

    images: np.ndarray
    labels: np.ndarray
    names: None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def content(self, index: int) -> bytes:
        return self.images[index].tobytes()

    def turned(self, index: int) -> bool:
        return False


@dataclass(frozen=True, eq=False)
class FolderSource(SharedArrays):
    """A source of image files, each decoded when it is read."""

    names: Names
    labels: np.ndarray
    channels: int
    exif_transpose: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.file(index)
        return read_image(path, self.channels, exif_transpose=self.exif_transpose)

    def file(self, index: int) -> str:
        """The path of an image."""
        return self.names[index]

    def content(self, index: int) -> bytes:
        return Path(self.file(index)).read_bytes()

    def turned(self, index: int) -> bool:
        return not self.exif_transpose and is_turned(self.file(index))


@dataclass(frozen=True, eq=False)
class EncodedSource(SharedArrays):
    """A source of image files in `records`, which are not files of their own."""

    records: Sequence[bytes]
    labels: np.ndarray
    channels: int
    name: str
    exif_transpose: bool = False
    names: None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        name = f"{self.name}[{index}]"
        return decode_image(
            self.file(index), self.channels, name=name, exif_transpose=self.exif_transpose
        )

    def file(self, index: int) -> BinaryIO:
        """The encoded image as an open file."""
        return io.BytesIO(self.content(index))

    def content(self, index: int) -> bytes:
        return self.records[int(index)]

    def turned(self, index: int) -> bool:
        return not self.exif_transpose and is_turned(self.file(index))


@dataclass(frozen=True, eq=False)
class Subset(SharedArrays):
    """A source of the images at `indices` [M] of another source, in that order."""

    source: Source
    indices: np.ndarray

    labels: np.ndarray = field(init=False)

    def __post_init__(self):  # here and not in every batch, which would index all labels
        object.__setattr__(self, "labels", self.source.labels[self.indices])

    @property
    def names(self) -> Names | None:
        names = self.source.names
        return None if names is None else names.at(self.indices.tolist())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source[self.indices[index]]

    def file(self, index: int) -> str | BinaryIO:
        """The image as the source has it; an `ArraySource` has no files."""
        return self.source.file(self.indices[index])

    def content(self, index: int) -> bytes:
        return self.source.content(self.indices[index])

    def turned(self, index: int) -> bool:
        return self.source.turned(self.indices[index])


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The three splits of a data set, and what is known about its images."""

    train: Source
    validation: Source
    """Empty if validation_fraction is 0 and the data set has no validation split."""

    test: Source
    """Empty if test_fraction is 0 and the data set has no test split."""

    class_names: tuple[str, ...]
    channels: int
    bad_images: tuple[tuple[str, str], ...] = ()
    """(path, reason) of the unreadable files that were left out."""

    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of hidden folders, and of files of each other suffix, among the images."""

    turned: dict[str, tuple[int, int]] = field(default_factory=dict)
    """{split: numbers of images with an unapplied EXIF rotation and of those examined}."""

    left_out: tuple[str, ...] = ()
    """Splits, and images without a label, that the data set has and that are not used."""

    checksum: str | None = None
    """SHA-256 of all images and labels, where the data set has one."""

    own_splits: tuple[str, ...] = ()
    """Splits besides training that are not cut off: the data set's own, or a fold as "test"."""

    def remarks(self, why_turned: str = TURN) -> Iterator[str]:
        """Yields a line for each fact about the images that the user should know."""
        shown = most(_NAMED)
        for path, reason in self.bad_images[:shown]:
            yield f"left out: {printable(path)} ({reason})"
        if more := self.bad_images[shown:]:
            yield f"left out: {len(more):,} more"
        yield from (f"left out: {what}" for what in self.left_out)
        yield from passed_over_remarks(self.passed_over)
        for split, (turned, looked_at) in self.turned.items():
            if turned:
                yield f"{turned_remark(turned, looked_at, why_turned)} ({split} split)"


def passed_over_remarks(passed_over: Counter[str]) -> Iterator[str]:
    """Yields the lines about what is passed over: files of other suffixes, hidden folders, and
    images that belong to no class."""
    files = Counter({k: n for k, n in passed_over.items() if k not in (HIDDEN_FOLDER, STRAY)})
    if files:
        kinds = listed(f"{count:,} {suffix}" for suffix, count in files.most_common())
        yield f"passed over: {files.total():,} file(s) not named as images: {kinds}"
    if folders := passed_over[HIDDEN_FOLDER]:
        yield f"passed over: {folders:,} {HIDDEN_FOLDER}(s)"
    if images := passed_over[STRAY]:
        yield f"passed over: {images:,} {STRAY.replace('image', 'image(s)')}"


def turned_remark(turned: int, looked_at: int, why: str) -> str:
    """The line about images with an EXIF rotation."""
    return f"{turned:,} of {looked_at:,} images carry an EXIF rotation that is not applied; {why}"


def places(dataset: str) -> list[str]:
    """The files and folders that the name of a data set means; [] of one without files of its
    own."""
    scheme, _, place = dataset.partition(":")
    place = os.path.expanduser(place)
    if scheme not in ("folder", "cifar10", "arrayrecord"):
        return []
    return [place] if os.path.exists(place) else glob.glob(place)


def same_place(one: str, other: str) -> bool:
    """True if two names of data sets mean the same, or files in common."""
    first, second = ({os.path.realpath(p) for p in places(name)} for name in (one, other))
    return one == other or bool(first & second)


def open_dataset(config: DataConfig) -> DataSet:
    """Open the data set `config.dataset` and make its splits.

    A single split besides training is the test. Missing splits are cut from the training images,
    stratified, the test first; with `folds` the test is one of the folds of the training images.
    Then at most `train_images` and `eval_images` are used.

    A folder holds class folders, which are one split, or the folders `train` and `test`, `val` or
    both of them. The usual other names of splits are understood in any case, and all this may be in
    a single folder inside the given one.

    Raises:
      InputError: the data are missing, unsafe or too few to split. With on_bad_image="error" a
        broken file raises later, when it is read.
    """
    scheme, _, place = config.dataset.partition(":")
    openers = {
        "digits": _digits,
        "folder": _folder,
        "cifar10": _cifar10,
        "tfds": _tfds,
        "arrayrecord": _array_record,
        "hf": _hugging_face,
    }
    splits, facts = openers[scheme](place, config)
    facts["class_names"] = _in_one_form(config.dataset, facts["class_names"])
    if config.folds:
        train = splits["train"]
        parts = cuts.fold(train.labels, config, facts["class_names"])
        splits["train"], splits["test"] = _subsets(train, parts)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")

    facts["own_splits"] = tuple(splits.keys() - {"train"})
    train = splits["train"]
    for split in ("test", "validation"):
        if split not in splits:
            splits[split] = Subset(train, np.arange(0))
            if getattr(config, f"{split}_fraction"):
                parts = cuts.cut(train.labels, config, f"{split}_fraction")
                train, splits[split] = _subsets(train, parts)
    splits["train"] = train
    limits = {"train": config.train_images}
    limits |= dict.fromkeys(("validation", "test"), config.eval_images)
    splits = {name: _limited(s, limits[name], config.split_seed) for name, s in splits.items()}
    facts["turned"] = {name: _turned(splits[name]) for name in limits}
    return DataSet(**(splits | facts))


def _in_one_form(dataset: str, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The names in Unicode's NFC; InputError if two are the same then."""
    names = tuple(normalize("NFC", name) for name in class_names)
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{dataset}: two classes look alike: {printable(ascii(name))}")
    return names


def _subsets(source: Source, parts: Sequence[np.ndarray]) -> tuple[Subset, ...]:
    return tuple(Subset(source, indices) for indices in parts)


def _limited(source: Source, count: int | None, seed: int) -> Source:
    """At most `count` images of a source."""
    if count is None or count >= len(source):
        return source
    return Subset(source, cuts.some(source.labels, count, seed))


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
    """Convert [N, H, W, 3] to gray [N, H, W, 1], as one tall image."""
    tall = Image.fromarray(images.reshape(-1, *images.shape[2:]))
    return np.asarray(tall.convert("L")).reshape(*images.shape[:3], 1)


def _folder(place: str, config: DataConfig) -> tuple[dict, dict]:
    root, channels = Path(os.path.expanduser(place)), 1 if config.grayscale else 3
    listings, passed_over = list_splits(root)
    bad = {}
    if config.on_bad_image == "skip":
        folders = (paths for listing in listings.values() for paths in listing.values())
        bad = bad_images(list(chain.from_iterable(folders)), channels)
    splits = {}
    for split, listing in listings.items():
        _check_images(root, split, listing, bad)
        splits[split] = _folder_source(listing, bad, channels, config.exif_transpose)
    facts = {"class_names": tuple(listings["train"]), "channels": channels}
    return splits, facts | {"bad_images": tuple(bad.items()), "passed_over": passed_over}


def _check_images(root: Path, split: str, listing: Listing, bad: dict[str, str]):
    """Raises InputError if a split, or a class of the training split, has no readable image."""
    for name, files in listing.items():
        if files and all(file in bad for file in files):
            raise InputError(
                f"folder:{root}: none of {len(files)} images can be read in class"
                f" {printable(name)} of {split}"
            )
        if not files and split == "train":
            raise InputError(
                f"folder:{root}: no image in class {printable(name)} of the training split; add"
                " some, or remove the folders of this class from every split"
            )
    if not any(listing.values()):
        raise InputError(f"folder:{root}: no image in any class of {split}; remove its folder")


def _folder_source(
    listing: Listing, bad: dict[str, str], channels: int, exif_transpose: bool
) -> FolderSource:
    good = [[file for file in files if file not in bad] for files in listing.values()]
    labels = np.repeat(np.arange(len(good), dtype=np.int32), [len(files) for files in good])
    return FolderSource(Names.of(chain.from_iterable(good)), labels, channels, exif_transpose)


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most `count` evenly spaced indices of a source that is too large to read whole."""
    return np.linspace(0, length - 1, min(length, count)).astype(int)


def _turned(source: Source) -> tuple[int, int]:
    """The numbers of images with an EXIF rotation that is not applied and of those examined."""
    indices = evenly_spaced(len(source), _LOOKED_AT)
    return sum(map(source.turned, indices)), len(indices)


def _tfds(place: str, config: DataConfig) -> tuple[dict, dict]:
    name, splits, class_names, channels, left_over = tfds.read(place)
    return _encoded(name, splits, class_names, channels, config, left_over)


def _array_record(place: str, config: DataConfig) -> tuple[dict, dict]:
    index, splits, checksum = shards.read(place)
    name, class_names = f"arrayrecord:{place}", tuple(index.class_names)
    splits, facts = _encoded(name, splits, class_names, index.channels, config)
    return splits, facts | {"checksum": checksum}


def _hugging_face(place: str, config: DataConfig) -> tuple[dict, dict]:
    splits, class_names, left_over = hugging_face.read(place)
    return _encoded(f"hf:{place}", splits, class_names, 3, config, left_over)


def _encoded(
    name: str,
    splits: dict[str, tuple[Sequence[bytes], np.ndarray]],
    class_names: tuple[str, ...],
    channels: int,
    config: DataConfig,
    left_over: Sequence[str] = (),
) -> tuple[dict, dict]:
    """The sources of {split: its records, and their classes}, and the facts about them.

    Args:
      splits: as in `hugging_face.Found`.
      left_over: names of the splits that are not used.
    """
    channels = 1 if config.grayscale else channels
    sources, left_out = {}, [f"the split {printable(other)} of {name}" for other in left_over]
    for split, (records, labels) in splits.items():
        whole = EncodedSource(records, labels, channels, f"{name}/{split}", config.exif_transpose)
        labelled = np.flatnonzero(labels >= 0)
        if missing := len(labels) - len(labelled):
            left_out.append(
                f"{missing:,} of {len(labels):,} images of {whole.name}, without labels"
            )
        if len(labels) and labels.max() >= len(class_names):
            raise InputError(
                f"{printable(whole.name)}: an image of class {labels.max()}, where"
                f" {len(class_names)} classes have names, from 0"
            )
        if len(labelled):
            sources[split] = Subset(whole, labelled) if missing else whole
    if "train" not in sources:
        found = listed([*sources, *left_over]) or "none"
        raise InputError(f"{name}: no train split with labels, only {found}")
    facts = {"class_names": class_names, "channels": channels, "left_out": tuple(left_out)}
    return sources, facts
