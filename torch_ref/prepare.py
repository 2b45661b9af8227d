"""A config and its data set brought together: what was left open is chosen here."""

import dataclasses
from dataclasses import replace

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2

from flax_resnet.config import TrainConfig, class_weights_from_file, natural_size, resolve
from flax_resnet.errors import InputError
from torch_ref.augment import augment, erase
from torch_ref.pipeline import channel_statistics, decode, normalize
from torch_ref.sources import DataSet, Images, open_dataset
from torch_ref.steps import parameter_dtype

_MEASURED = 50_000  # images at most that mean and standard deviation are taken from


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Data ready for a run."""

    config: TrainConfig
    """The config with image size, crop, stem, number of classes, mean and std filled in."""

    dataset: DataSet
    """Splits with the images as evaluation sees them."""

    augmented: Images
    """The training split as training sees it."""


def prepare(config: TrainConfig) -> Prepared:
    """Open the data set, choose what the config left open.

    Raises:
      InputError: the data is missing or broken, or disagrees with the config.
    """
    dataset = open_dataset(config.data)
    train = dataset.splits["train"]
    size = config.data.image_size or natural_size(*reversed(train.image(0).size))
    config = resolve(config, image_size=size, num_classes=len(dataset.class_names))
    if config.batch_size > len(train):
        raise InputError(f"`batch_size` {config.batch_size} is more than {len(train)} images")
    steps, together = config.epochs * (len(train) // config.batch_size), config.optimizer
    if steps < together.accumulate_steps:
        given = f"`accumulate_steps` {together.accumulate_steps}"
        raise InputError(f"{given}: nothing would be trained in {steps} step(s)")
    if config.data.mean is None:
        mean, std = _statistics(config, dataset)
        config = replace(config, data=replace(config.data, mean=mean, std=std))
    for name in ("mean", "std"):  # torch would repeat a single one
        count = len(getattr(config.data, name))
        if count != dataset.channels:
            raise InputError(f"`{name}` has {count} values, the images {dataset.channels} channels")
    transform = v2.Compose(_plain(config, dataset))
    splits = {k: replace(images, transform=transform) for k, images in dataset.splits.items()}
    augmented = replace(train, transform=v2.Compose(_augmented(config, dataset)))
    return Prepared(config, replace(dataset, splits=splits), augmented)


def _plain(config: TrainConfig, dataset: DataSet) -> list[v2.Transform]:
    return [*decode(config.data, dataset.channels), *normalize(config.data, _dtype(config))]


def _augmented(config: TrainConfig, dataset: DataSet) -> list[v2.Transform]:
    how, data = config.augment, config.data
    return [
        *decode(data, dataset.channels, how),
        *augment(how, data),
        *normalize(data, _dtype(config)),
        *erase(how),
    ]


def _dtype(config: TrainConfig) -> torch.dtype:
    return parameter_dtype(getattr(torch, config.model.dtype))


def _statistics(config: TrainConfig, dataset: DataSet):
    """Mean and standard deviation of the training split; of many images, of so many of them,
    evenly spaced."""
    train = dataset.splits["train"]
    numbers = np.linspace(0, len(train) - 1, min(len(train), _MEASURED)).astype(int)
    decoded = v2.Compose(decode(config.data, dataset.channels))
    return channel_statistics(replace(train.subset(numbers), transform=decoded))


def class_weights(given: str | None, dataset: DataSet) -> torch.Tensor | None:
    """Weights of the classes in the loss: scikit-learn's "balanced", or of a JSON file.

    Raises:
      InputError: the file is unreadable, or a class has no training image to balance.
    """
    if given is None:
        return None
    if given == "balanced":
        labels, classes = dataset.splits["train"].labels, np.arange(len(dataset.class_names))
        if missing := sorted({*classes} - {*labels}):
            name = dataset.class_names[missing[0]]
            raise InputError(f"`class_weights` balanced: class {name} has no training image")
        return torch.tensor(compute_class_weight("balanced", classes=classes, y=labels))
    weights = class_weights_from_file(given, dataset.class_names)
    return torch.tensor([weights[name] for name in dataset.class_names], dtype=torch.float64)
