"""Warnings about a run that ends without an error and may still have gone wrong."""

import math
from collections.abc import Sequence

import numpy as np

from flax_resnet.config import DataConfig, TrainConfig, flat

_FEWEST_STEPS = 10
_DROPPED = 0.05  # share of the training images above which the dropped ones are mentioned
_ABOVE_GUESSING = 1.5  # times the loss of uniform guessing


def of_training(num_images: int, batch_size: int) -> list[str]:
    """Warnings before the first step.

    Args:
      num_images: in the training split.
      batch_size: over all devices, at most `num_images`.
    """
    steps, dropped = divmod(num_images, batch_size)
    found = []
    if steps < _FEWEST_STEPS:
        found.append(f"an epoch has only {steps} step(s): {num_images:,} images in batches of"
                     f" {batch_size:,}; smaller batches give more steps")  # fmt: skip
    if dropped > _DROPPED * num_images:
        found.append(f"{dropped:,} of {num_images:,} training images are left out of every epoch,"
                     f" others each time: they do not fill a batch of {batch_size:,}")  # fmt: skip
    return found


def of_settings(config: TrainConfig, channels: int, own_splits: Sequence[str]) -> list[str]:
    """Warnings about settings that do nothing with this data, or in so few epochs.

    Args:
      channels: of the images.
      own_splits: "validation", "test", or both, where the data set brings them with it.
    """
    found = _beyond_the_end(config) + _unused(config, own_splits)
    for name in (f"{split}_fraction" for split in own_splits):
        if getattr(config.data, name) != getattr(DataConfig(), name):
            found.append(f"`{name}` has no effect: {_why_whole(config.data, name)}")
    for name in ("saturation", "hue"):
        if channels == 1 and getattr(config.augment, name):
            found.append(f"`{name}` has no effect: the images are gray")
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.optimizer == "sgd" and optimizer.nesterov and not optimizer.momentum:
        found.append("`nesterov` has no effect with `momentum` 0")
    if schedule.schedule in ("cosine", "plateau") and schedule.min_lr > optimizer.lr:
        found.append(
            f"`min_lr` {schedule.min_lr:g} is above `lr` {optimizer.lr:g}, which cannot fall"
        )
    if schedule.schedule_per == "epoch" and schedule.warmup_epochs % 1:
        found.append(
            f"`warmup_epochs` {schedule.warmup_epochs:g}: with `schedule_per` epoch the warm-up has"
            f" {round(schedule.warmup_epochs)} epoch(s)"
        )
    return found


def _unused(config: TrainConfig, own_splits: Sequence[str]) -> list[str]:
    optimizer, schedule, data = config.optimizer, config.schedule, config.data
    cut = [s for s in ("validation", "test") if getattr(data, f"{s}_fraction")]
    drawn = {*cut} - {*own_splits} or data.folds or data.train_images or data.eval_images
    moved = "momentum" if optimizer.optimizer in ("sgd", "rmsprop") else "beta1"
    reasons = {
        f"optimizer.{moved}": schedule.cycle_momentum and "`cycle_momentum` sets it at every step",
        "optimizer.decoupled_weight_decay": optimizer.optimizer == "adamw" and "adamw's always is",
        "optimizer.ema_after_warmup": not schedule.warmup_epochs and "there is no warm-up",
        "schedule.warmup_within": not schedule.warmup_epochs and "there is no warm-up",
        "data.split_seed": not drawn and "no split is drawn",
        "early_stopping.restore_best": "validation" not in {*own_splits, *cut}
        and "there is no validation split to find the best epoch",
    }
    values, defaults = flat(config), flat(TrainConfig())
    return [
        f"`{name.rpartition('.')[2]}` has no effect: {why}"
        for name, why in reasons.items()
        if why and values[name] != defaults[name]
    ]


def of_updates(config: TrainConfig, num_steps: int) -> list[str]:
    """Warnings about settings that reach beyond the updates of a run.

    Args:
      num_steps: training steps of the whole run.
    """
    updates = num_steps // config.optimizer.accumulate_steps
    if config.optimizer.ema_decay and 1 < updates <= config.optimizer.ema_steps:
        return [f"`ema_steps` {config.optimizer.ema_steps:,} lies beyond the {updates:,} update(s)"
                " of the run: the average stays at the weights after the first"]  # fmt: skip
    return []


def _why_whole(data: DataConfig, name: str) -> str:
    if data.folds and name == "test_fraction":
        return "a fold is the test split"
    return "the data set has such a split of its own"


def _beyond_the_end(config: TrainConfig) -> list[str]:
    kind, schedule, epochs = config.schedule.schedule, config.schedule, config.epochs
    lengths = {
        "warmup_epochs": (schedule.warmup_epochs,),
        "milestones": schedule.milestones if kind == "multistep" else (),
        "step_epochs": (schedule.step_epochs,) if kind == "step" else (),
        "plateau_patience": (schedule.plateau_patience,) if kind == "plateau" else (),
        "patience": (config.early_stopping.patience,),
    }
    late = {n: [f"{x:g}" for x in values if x >= epochs] for n, values in lengths.items()}
    return [
        f"`{name}` {' '.join(values)} lies beyond the {epochs} epoch(s) of the run"
        for name, values in late.items()
        if values
    ]


def of_results(splits: dict[str, dict], confusions: dict[str, np.ndarray],
               class_names: Sequence[str]) -> list[str]:  # fmt: skip
    """Warnings about the figures of every split.

    Args:
      splits: {split: {"loss": nats an image, ...}}.
      confusions: {split: counts `[K, K]`, row = true class, column = predicted class}.
    """
    found = []
    guessing = math.log(len(class_names))
    for split, values in splits.items():
        labels, predictions = (np.flatnonzero(confusions[split].sum(axis)) for axis in (1, 0))
        if len(labels) > 1 and len(predictions) == 1:
            name = class_names[predictions[0]]
            found.append(f"{split}: every image is predicted as {name}")
        if values["loss"] > _ABOVE_GUESSING * guessing:
            found.append(f"{split}: the loss {values['loss']:.3g} is far above {guessing:.3g},"
                         " that of equal probabilities for all classes")  # fmt: skip
    return found
