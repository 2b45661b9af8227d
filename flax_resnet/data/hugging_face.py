"""Reads image classification sets of the Hugging Face Hub, or of a folder, by `datasets`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.data.folders import chosen_splits
from flax_resnet.data.image_files import BadImage
from flax_resnet.errors import InputError, extra_needed
from flax_resnet.libraries import check_home, quiet
from flax_resnet.text import listed, printable


class Found(NamedTuple):
    """A data set."""

    splits: dict[str, tuple[Sequence[bytes], np.ndarray]]
    """{split: its image files, and their classes int32 [N]}; images without a label have -1."""

    class_names: tuple[str, ...]

    left_over: list[str]
    """Names of the splits that are not used."""


@dataclass(frozen=True)
class _Images(Sequence):
    """The image files in a column of a split, whose images are not decoded."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        [image] = self.rows[index].values()
        if image is None or image["bytes"] is not None:
            return image["bytes"] if image else b""
        if not os.path.isfile(image["path"]):
            raise BadImage(f"{printable(image['path'], 1000)}: not a readable image (no such file)")
        return Path(image["path"]).read_bytes()


def read(place: str) -> Found:
    """Open a data set: `OWNER/NAME`, `OWNER/NAME:CONFIG`, or a folder that `save_to_disk` wrote.

    Raises:
      InputError: `datasets` is not installed or cannot open the set, or the set has not one column
        of images and one of classes.
    """
    try:
        import datasets
    except ImportError:
        raise extra_needed(f"hf:{place}", "datasets", "datasets") from None
    splits = _loaded(datasets, place)
    encoded = datasets.Image(decode=False)
    chosen, left_over = chosen_splits(splits)
    found, classes = {}, {}
    for split, name in chosen.items():
        features = splits[name].features
        image = _column(place, features, datasets.Image, "image")
        label = _column(place, features, datasets.ClassLabel, "label")
        classes[name] = features[label].names
        labels = _labels(splits[name].select_columns([label])[:][label])
        rows = splits[name].select_columns([image]).cast_column(image, encoded)
        found[split] = _Images(rows), labels
    return Found(found, _common(place, classes), left_over)


def _common(place: str, classes: dict[str, list[str]]) -> tuple[str, ...]:
    """The names of the classes; InputError unless all splits have the same in the same order."""
    first, names = next(iter(classes.items()), ("", []))
    for split, own in classes.items():
        if own != names:
            raise InputError(
                f"hf:{place}: the split {printable(split)} has the classes {listed(own)},"
                f" {printable(first)} has {listed(names)}"
            )
    return tuple(names)


def _loaded(datasets, place: str) -> dict:
    """{split: its rows}"""
    folder = os.path.expanduser(place)
    name, _, config = place.partition(":")
    try:
        with quiet("huggingface_hub"):  # it logs every retry
            if os.path.exists(os.path.join(folder, "dataset_dict.json")):
                return datasets.load_from_disk(folder)
            check_home(str(datasets.config.HF_DATASETS_CACHE), f"hf:{place}", "HF_HOME")
            return datasets.load_dataset(folder if os.path.isdir(folder) else name, config or None)
    except Exception as error:  # a set's own reader may raise anything
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"hf:{place}: {printable(reason)}") from None


def _column(place: str, features: dict, kind: type, usual: str) -> str:
    """The name of the only column of a kind, or of the one with the usual name."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if usual in names:
        return usual
    if len(names) != 1 or usual in features:  # which is no such column
        raise InputError(
            f"hf:{place} is no image classification set: it needs one column of the type"
            f" {kind.__name__}, or one of them called {usual}; of its columns {listed(features)}"
            f" {listed(names) if names else 'none'} have that type"
        )
    return names[0]


def _labels(column: list) -> np.ndarray:
    return np.array([-1 if label is None else label for label in column], np.int32)
