"""Image classification sets of TensorFlow Datasets, with random access to the encoded images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import NamedTuple

import numpy as np

from flax_resnet.data.folders import chosen_splits
from flax_resnet.errors import InputError, extra_needed
from flax_resnet.libraries import check_home


class Found(NamedTuple):
    """The content of a set."""

    name: str
    """The full name, with the version."""

    splits: dict[str, tuple[Sequence[bytes], np.ndarray]]
    """{"train", "validation" or "test": image files, and their classes, int32 [N]}."""

    class_names: tuple[str, ...]
    channels: int
    left_over: Sequence[str]
    """Names of the splits that are not used."""


def read(name: str) -> Found:
    """Open `tfds:name`, which is prepared if it was not.

    Raises:
      InputError: TensorFlow Datasets is not installed, or has no such set of images with classes.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise extra_needed(f"tfds:{name}", "tensorflow-datasets", "tfds") from None
    builder = _prepared(tfds, name)
    features = dict(builder.info.features)
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise InputError(
            f"tfds:{name} is no image classification set: it has the features "
            f"{', '.join(sorted(features))}, and needs image (Image) and label (ClassLabel)"
        )
    chosen, left_over = chosen_splits(builder.info.splits)
    label = features["label"]
    return Found(
        name=f"tfds:{builder.info.full_name}",
        splits={split: _split(tfds, builder, name) for split, name in chosen.items()},
        class_names=tuple(map(label.int2str, range(label.num_classes))),
        channels=1 if features["image"].shape[-1] == 1 else 3,
        left_over=left_over,
    )


def _prepared(tfds, name: str):
    """The builder of a data set with random access, which is prepared if TFDS can."""
    builder = None
    if "TFDS_DATA_DIR" not in os.environ:
        check_home(os.path.expanduser("~"), f"tfds:{name}", "TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
        builder.download_and_prepare(file_format="array_record")
        builder.as_data_source(next(iter(builder.info.splits)))
        return builder
    except Exception as error:  # a builder's own code may raise anything
        reason = shorten(str(error) or repr(error), 200, placeholder=" ...")
    command = f"uv run --extra tfds --with tensorflow tfds build {name} --file_format=array_record"
    if builder and builder.is_prepared():  # in a format that has no random access
        command += " --data_dir=NEW_FOLDER, and set TFDS_DATA_DIR=NEW_FOLDER"
    raise InputError(f"tfds:{name}: {reason}; prepare it with: {command}")


def _split(tfds, builder, split: str) -> tuple["_Images", np.ndarray]:
    # Encoded images are kept: TFDS's own decoder gives gray JPEGs the wrong shape.
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split, decoders=decoders)
    labels = [records[index]["label"] for index in range(len(records))]
    return _Images(records), np.array(labels, np.int32)


@dataclass(frozen=True)
class _Images(Sequence):
    """The image files in the records of a TFDS split."""

    records: Sequence[dict]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.records[index]["image"]
