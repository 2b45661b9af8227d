"""Choices of images by their labels: cut in two, folded, or some of them.

All functions take labels, int32 [N], and return increasing indices. They are stratified: every
class keeps its share.
"""

import math
from itertools import islice

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from flax_resnet.config import DataConfig
from flax_resnet.errors import InputError


def some(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` indices, stratified if that is enough for every class."""
    everything = np.arange(len(labels))
    if _can_stratify(labels, len(labels) - count):
        chosen, _ = train_test_split(
            everything, train_size=count, stratify=labels, random_state=seed
        )
    else:
        chosen = np.random.default_rng(seed).choice(everything, count, replace=False)
    return np.sort(chosen)


def _can_stratify(labels: np.ndarray, off: int) -> bool:
    """True if scikit-learn can cut `off` images and keep the classes' shares."""
    counts = np.unique(labels, return_counts=True)[1]
    return min(off, len(labels) - off) >= len(counts) and counts.min() >= 2


def cut(labels: np.ndarray, config: DataConfig, field: str) -> tuple[np.ndarray, np.ndarray]:
    """The indices that stay, and the share `config.field` that is cut off.

    Raises:
      InputError: the images are too few.
    """
    value, total = getattr(config, field), len(labels)
    classes, counts = np.unique(labels, return_counts=True)
    stay = off = np.arange(0)
    if _can_stratify(labels, math.ceil(value * total)):
        stay, off = train_test_split(
            np.arange(total), test_size=value, stratify=labels, random_state=config.split_seed
        )
    if len(np.unique(labels[stay])) < len(classes):
        raise InputError(
            f"{config.dataset}: `{field}` {value} cannot be stratified over {total} images of "
            f"{len(classes)} classes, the smallest of {counts.min()}: both parts need as many "
            "images as there are classes, and every class needs two images, one of them left over"
        )
    return np.sort(stay), np.sort(off)


def fold(
    labels: np.ndarray, config: DataConfig, names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The indices without the fold `config.fold`, and the fold; scikit-learn's StratifiedKFold.

    Args:
      names: of the classes.

    Raises:
      InputError: a class has fewer images than there are folds.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < config.folds:
        raise InputError(
            f"{config.dataset}: `folds` {config.folds} is more than the {counts.min()} images of"
            f" the smallest class ({names[classes[counts.argmin()]]})"
        )
    cutter = StratifiedKFold(config.folds, shuffle=True, random_state=config.split_seed)
    parts = cutter.split(np.zeros(len(labels)), labels)
    return next(islice(parts, config.fold, None))
