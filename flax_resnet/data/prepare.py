"""Opens the data set of a config and chooses the settings that the config leaves open."""

import contextlib
import dataclasses
import functools
import hashlib
import os
from dataclasses import replace
from unicodedata import normalize

import numpy as np

from flax_resnet.config import (
    INT32,
    DataConfig,
    TrainConfig,
    class_weights_from_file,
    natural_size,
    resolve,
)
from flax_resnet.data import pipeline
from flax_resnet.data.image_files import BadImage
from flax_resnet.data.pipeline import Decoder
from flax_resnet.data.sources import DataSet, Source, evenly_spaced, open_dataset
from flax_resnet.devices import distributed
from flax_resnet.errors import InputError

SPLITS = ("train", "validation", "test")
CHOSEN = frozenset({
    "data.image_size", "data.resize_size", "data.mean", "data.std",
    "augment.random_crop", "model.stem", "model.num_classes",
})  # fmt: skip
"""Settings that `prepare` chooses where a config leaves them open."""
_MEASURED = 50_000  # most images from which mean and standard deviation are computed
_AT_ONCE = 1_000  # of these images, so many are in memory at once
_FINGERPRINTED = 64  # most images of a split that are compared


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The complete config of a run and its data."""

    config: TrainConfig
    """Config with image size, stem, number of classes, mean and std filled in."""

    dataset: DataSet
    """Sources and class names."""

    images: dict[str, np.ndarray]
    """{split: decoded images, uint8 [N, S, S, C]}; other splits are decoded in every epoch."""

    class_weights: np.ndarray | None = None
    """Weights of the classes in the loss, float64 [K]; None: all equal."""

    @property
    def training_decoder(self) -> Decoder:
        """The decoder of training images."""
        how = self.config.augment
        return replace(
            self.decoder,
            size=self.config.data.train_size or self.config.data.image_size,
            random_resized_crop=how.random_resized_crop,
            scale=how.scale,
            ratio=how.ratio,
        )

    @property
    def decoder(self) -> Decoder:
        """The decoder of an evaluation."""
        return evaluation_decoder(self.config.data)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the network's input."""
        size = self.config.data.image_size
        return size, size, self.dataset.channels


def evaluation_decoder(data: DataConfig) -> Decoder:
    """The decoder of an evaluation, for a config whose sizes are filled in."""
    return Decoder(size=data.image_size, resize=data.resize_size, interpolation=data.interpolation)


def prepare(config: TrainConfig) -> Prepared:
    """Open the data set, choose the settings that the config leaves open, decode the splits that
    fit.

    Raises:
      InputError: the data are missing or broken, or disagree with the config.
    """
    dataset = open_dataset(config.data)
    if not len(dataset.test):
        raise InputError(
            f"{config.data.dataset}: `test_fraction` 0 leaves nothing for the test, and the set has"
            " no test split of its own"
        )
    size = config.data.image_size or suggested_size(dataset)
    config = resolve(config, image_size=size, num_classes=len(dataset.class_names))
    if config.batch_size > len(dataset.train):
        raise InputError(
            f"`batch_size` {config.batch_size} is larger than the training split"
            f" ({len(dataset.train)} images)"
        )
    _check_steps(config, len(dataset.train))
    decoder = evaluation_decoder(config.data)
    images = {
        split: _decode(source, decoder, np.arange(len(source)))
        for split, source in that_fit(config, dataset).items()
    }
    if config.data.mean is None:
        mean, std = _statistics(dataset.train, decoder, images.get("train"))
        config = replace(config, data=replace(config.data, mean=mean, std=std))
    for name in ("mean", "std"):
        count = len(getattr(config.data, name))
        if count != dataset.channels:
            raise InputError(f"`{name}` has {count} values, the images {dataset.channels} channels")
    weights = class_weights(config.optimizer.class_weights, dataset)
    return Prepared(config, dataset, images, weights)


def class_weights(given: str | None, dataset: DataSet) -> np.ndarray | None:
    """Weights of the classes [K]: "balanced" gives each class's images the same sum, and all images
    the mean 1; else a JSON file {class: weight}.

    Raises:
      InputError: the file is unreadable, or does not give each class a positive weight.
    """
    if given is None:
        return None
    if given == "balanced":
        counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
        if not counts.all():
            missing = dataset.class_names[int(counts.argmin())]
            raise InputError(f"`class_weights` balanced: class {missing} has no training image")
        return counts.sum() / (len(counts) * counts)
    weights = class_weights_from_file(given, dataset.class_names)
    return np.array([weights[name] for name in dataset.class_names])


def _check_steps(config, num_images):
    steps = config.epochs * pipeline.steps_per_epoch(num_images, config.batch_size)
    if steps > INT32:
        raise InputError(
            f"`epochs` {config.epochs:,} of `batch_size` {config.batch_size:,} are {steps:,} steps;"
            f" a run has at most {INT32:,}"
        )
    if steps < config.optimizer.accumulate_steps:
        raise InputError(
            f"`accumulate_steps` {config.optimizer.accumulate_steps:,} is more than the {steps:,}"
            " step(s) of the run, which would train nothing"
        )


def _statistics(source, decoder, images: np.ndarray | None):
    """Mean and standard deviation of the training split, with its decoded images or None."""
    indices = evenly_spaced(len(source), _MEASURED)
    parts = np.array_split(indices, -(-len(indices) // _AT_ONCE))
    take = functools.partial(_decode, source, decoder) if images is None else images.__getitem__
    return pipeline.channel_statistics(sum(pipeline.count_levels(take(part)) for part in parts))


def _decode(source, decoder, indices) -> np.ndarray:
    """Decode images; each process decodes a share, and the results are all-gathered."""
    own = indices[distributed.share(len(indices))]
    part = distributed.run_on_all(lambda: pipeline.decode_all(source, decoder, own))
    return distributed.gather_rows(part, len(indices))


def contents(dataset: DataSet, weights: np.ndarray | None = None) -> dict:
    """Facts about a data set that a resumed run compares: its classes and a digest of their
    weights, the checksum of its files if it has one, and for each split the number of images, a
    digest of labels and file names (without the folder's path), and one of some files."""
    facts = {"classes": ", ".join(dataset.class_names)}
    if weights is not None:
        digest = hashlib.sha256(np.asarray(weights, np.float64).tobytes()).hexdigest()
        facts["class weights"] = f"SHA-256 {digest[:16]}"
    if dataset.checksum:
        facts["files"] = f"SHA-256 {dataset.checksum[:16]}"
    for split in SPLITS:
        source = getattr(dataset, split)
        digest = hashlib.sha256(np.asarray(source.labels, np.int32).tobytes())
        names = source.names  # a subset makes them anew at every access
        if names is not None:
            digest.update(b"".join(name.rpartition(b"/")[2] + b"/" for name in names.encoded()))
        facts[f"{split} images"] = f"{len(source)}, SHA-256 {digest.hexdigest()[:16]}"
        facts[f"{split} files"] = f"SHA-256 {_digest_of_some(source)}"
    return facts


def _digest_of_some(source: Source) -> str:
    """A digest of evenly spaced images: a copy in another size or encoding has other bytes."""
    digest = hashlib.sha256()
    for index in evenly_spaced(len(source), _FINGERPRINTED):
        with contextlib.suppress(BadImage, OSError):  # reading the image says so
            digest.update(source.content(index))
    return digest.hexdigest()[:16]


def check_contents(now: dict, before: dict):
    """Raises InputError if the contents of a run's data have changed."""
    for what, value in now.items():
        # Checkpoints of earlier versions lack some facts, or have names in the disk's form.
        if normalize("NFC", before.get(what, value)) != normalize("NFC", value):
            raise InputError(
                f"the data have changed since the run began: {what}: {before[what]}, now {value}"
            )


def fingerprint(prepared: Prepared) -> dict:
    """The contents of the data and digests of some images, for processes to compare."""
    facts = contents(prepared.dataset, prepared.class_weights)
    for split in SPLITS:
        source = getattr(prepared.dataset, split)
        if len(source):
            indices = evenly_spaced(len(source), _FINGERPRINTED)
            images = pipeline.decode_all(source, prepared.decoder, indices)
            facts[f"{split} pixels"] = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    return facts


def suggested_size(dataset: DataSet) -> int:
    """The pixels a side that the first training image suggests."""
    try:
        first = dataset.train[0]
    except BadImage as error:
        first = error
    [[image]] = pipeline.whole([[first]], dataset.train)
    return natural_size(*image.shape[:2])


def that_fit(config: TrainConfig, dataset: DataSet) -> dict:
    """{split: source} of the splits to keep decoded, the training split first."""
    data, sources, kept = config.data, {}, 0
    left = {"device": np.inf, "none": 0, "auto": data.cache_gib * 2**30}[data.cache]
    for split in SPLITS:
        if split == "train" and config.augment.random_resized_crop:
            continue  # every epoch crops other areas
        source = getattr(dataset, split)
        size = len(source) * data.image_size**2 * dataset.channels
        if 0 < size <= left:
            sources[split] = source
            left -= size
            kept += size
    if kept > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise InputError(
            f"the decoded images take {kept / 2**30:,.1f} GiB, this machine has"
            f" {memory / 2**30:,.1f}: give `cache` none"
        )
    return sources
