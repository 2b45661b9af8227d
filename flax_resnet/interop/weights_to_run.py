"""Makes runs from weights; class names, sizes and statistics come from flags or from data."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import numpy as np

from flax_resnet.config import TrainConfig, from_dict
from flax_resnet.data.prepare import prepare
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import LoadedRun, load_run
from flax_resnet.models import create_from_config
from flax_resnet.runs import environment
from flax_resnet.runs.views import warn
from flax_resnet.text import listed
from flax_resnet.training import restore
from flax_resnet.training.network import Network
from flax_resnet.weights import convert, published

NO_DATA = "folder:left-out"  # data set of a run that was made without data


class OtherClasses(InputError):
    """Raised if weights and data differ in the number of classes."""


def with_model_of(
    config: TrainConfig, architecture: convert.Architecture, arrays: dict[str, np.ndarray]
) -> TrainConfig:
    """The config with the model of the weights; without a head num_classes stays open."""
    if convert.has_head(arrays) and architecture.num_classes < 2:
        raise InputError("the weights have one class; a run has at least two")
    wide = any(array.dtype == np.float64 for array in arrays.values())
    model = replace(
        config.model,
        arch=architecture.arch,
        stem=architecture.stem,
        shortcut=architecture.shortcut,
        num_classes=architecture.num_classes if convert.has_head(arrays) else None,
        dtype="float64" if wide else config.model.dtype,
    )
    return replace(config, model=model)


def with_data(config: TrainConfig, channels: int | None) -> tuple[TrainConfig, object]:
    """The config with the sizes and statistics of its data set, and the data set.

    Args:
      channels: number of channels of the weights; None takes any data.

    Raises:
      InputError: the data are missing, or have other channels or classes.
    """
    # Nothing is trained, so that batches need not fit and no image is kept.
    loose = replace(config, batch_size=1, data=replace(config.data, cache="none"))
    prepared = prepare(replace(loose, model=replace(config.model, num_classes=None)))
    dataset, classes = prepared.dataset, config.model.num_classes
    if classes not in (None, len(dataset.class_names)):
        raise OtherClasses(
            f"the weights have {classes} classes, {config.data.dataset} has"
            f" {len(dataset.class_names)}"
        )
    if channels not in (None, dataset.channels):
        raise InputError(
            f"the weights are for {channels} channels, {config.data.dataset} has {dataset.channels}"
        )
    data = replace(prepared.config.data, cache=config.data.cache)
    return replace(prepared.config, batch_size=config.batch_size, data=data), dataset


def without_data(config: TrainConfig, dataset: str | None, channels: int) -> TrainConfig:
    """The config with its sizes filled in without reading data.

    Args:
      dataset: name of the data set to store in the config, or None.

    Raises:
      InputError: image size or statistics are missing, or do not fit the channels.
    """
    data = config.data
    if None in (data.image_size, data.mean, data.std):
        raise InputError("without `dataset`, `image_size`, `mean` and `std` are needed")
    check_channels(config, channels)
    resize = data.resize_size or data.image_size
    return replace(config, data=replace(data, dataset=dataset or NO_DATA, resize_size=resize))


def check_channels(config: TrainConfig, channels: int):
    """Raises InputError if the images of a complete config have other channels than the weights."""
    data = config.data
    if data.grayscale and channels != 1:
        raise InputError(f"`grayscale` makes images of 1 channel, the weights are for {channels}")
    if len(data.mean) != channels or len(data.std) != channels:
        raise InputError(f"`mean` and `std` need {channels} values, one for each channel")


def class_names(text: str, num_classes: int | None) -> tuple[str, ...]:
    """The class names in a file, one a line, or in a list with commas; `num_classes` of them or
    any.

    Raises:
      InputError: the file is unreadable, the number of names is wrong, or a name is given twice.
    """
    is_file = os.path.isfile(text)  # also False for a list that is too long for a path
    try:
        # utf-8-sig skips the byte order mark that Windows puts first.
        lines = Path(text).read_text("utf-8-sig").split("\n") if is_file else text.split(",")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"`class_names`: {text} is no readable text") from None
    names = tuple(normalize("NFC", line.strip()) for line in lines if line.strip())
    if len(names) != (num_classes or len(names)):
        where = text if is_file else f"{text} (a list: there is no such file)"
        raise InputError(
            f"`class_names`: {len(names)} names in {where}, the weights have {num_classes}"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"`class_names`: given twice: {listed(twice)}")
    return names


def check_order(names: tuple[str, ...], known: tuple[str, ...]):
    """Raises InputError if `names` are those that the weights know, in another order."""
    if names != tuple(known) and sorted(names) == sorted(known):
        raise InputError(
            f"`class_names`: {listed(names)}; the weights have these classes in the order"
            f" {listed(known)}, and another one would exchange them"
        )


def open_run(source: str) -> LoadedRun:
    """The run in a directory, or weights by name, whose publisher tells their normalisation.

    Raises:
      InputError: as in `load_run` and `restore.pretrained`, or the publisher tells nothing.
    """
    if not published.is_name(source):
        return load_run(source)
    said = []
    weights = restore.pretrained(source, say=said.append)
    if not weights.data:
        raise InputError(
            f"{source}: nothing tells how its images are normalised; make a run of it: convert"
            f" {source} DIR --class-names FILE --image-size N --mean ... --std ..."
        )
    for line in said:
        warn(line)
    architecture = convert.describe(weights.arrays, **weights.model)
    arrays = convert.conform(weights.arrays, architecture.shapes())
    config = with_model_of(from_dict({"data": weights.data}), architecture, arrays)
    config = without_data(config, None, architecture.in_channels)
    names = weights.class_names or tuple(map(str, range(architecture.num_classes)))
    environment.configure_jax(config)
    return as_run(arrays, config, names, architecture.in_channels)


def as_run(
    arrays: dict[str, np.ndarray], config: TrainConfig, names: tuple[str, ...], channels: int
) -> LoadedRun:
    """A run of these weights, or with a new head, and a complete config as of `with_data`."""
    if not convert.has_head(arrays):
        config = replace(config, model=replace(config.model, num_classes=len(names)))
    model = create_from_config(config.model, in_channels=channels)
    if not convert.has_head(arrays):
        own = convert.state_dict(model)
        arrays = arrays | {name: own[name] for name in own if name.startswith("fc.")}
    network = Network(
        convert.load_state_dict(model, arrays), freeze_backbone=config.freeze_backbone
    )
    return LoadedRun(config, names, channels, network, network.initial)
