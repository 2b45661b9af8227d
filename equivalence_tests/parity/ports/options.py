"""Checks of what a caller gives to `compare_models`, each answered in one line."""

import operator
from pathlib import Path

import numpy as np
import optax
from torch import nn

from equivalence_tests.parity import own_model
from flax_resnet.errors import InputError


def check_networks(torch_module):
    """Raises InputError unless the standard is a PyTorch network."""
    if isinstance(torch_module, type) and issubclass(torch_module, nn.Module):
        name = torch_module.__name__
        raise InputError(f"torch_module is the class {name}; give a network, {name}(...)")
    if not isinstance(torch_module, nn.Module):
        raise InputError(f"torch_module is a {type(torch_module).__name__}, no nn.Module")
    own_model.check_initialised(torch_module)


def size(image_size) -> tuple[int, int] | None:
    """(H, W) from a number for both, (H,) or (H, W); None stays None."""
    if image_size is None:
        return None
    sides = image_size if np.ndim(image_size) == 1 else [image_size]
    if len(sides) not in (1, 2):
        raise InputError(f"image_size is {image_size!r}, not a height and a width")
    height, width = (whole("image_size", side, 1) for side in [*sides, *sides][:2])
    return height, width


def whole(name: str, value, least: int) -> int:
    """The value as an int.

    Raises:
      InputError: it is none, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise InputError(f"{name} is {value!r}, not a whole number of {least} or more")
    return number


def check_flag(name: str, value):
    """Raises InputError unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {value!r}, neither True nor False")


def mapping_file(mapping, converter) -> Path | None:
    """The mapping's file, which a converter makes useless.

    Raises:
      InputError: both are given, the converter cannot be called, or the file cannot be written.
    """
    if converter is not None and not callable(converter):
        raise InputError(f"converter is a {type(converter).__name__}, no function")
    if mapping is None:
        return None
    if converter is not None:
        raise InputError("a converter and a mapping exclude each other: both say where tensors go")
    if not isinstance(mapping, str | Path) or not str(mapping):
        raise InputError(f"mapping is {mapping!r}, no file name")
    file = Path(mapping)
    if file.is_dir():
        raise InputError(f"mapping: {file} is a folder")
    if not file.parent.is_dir():
        raise InputError(f"mapping: there is no folder {file.parent}")
    return file


def check_optimizers(optax_optimizer, torch_optimizer):
    """Raises InputError unless both optimizers are given, or none."""
    if optax_optimizer is None and torch_optimizer is None:
        return
    given = optax.GradientTransformation, optax.MultiSteps
    if not isinstance(optax_optimizer, given):
        kind = type(optax_optimizer).__name__
        raise InputError(f"optax_optimizer is a {kind}, no GradientTransformation")
    if not callable(torch_optimizer):
        kind = type(torch_optimizer).__name__
        raise InputError(f"torch_optimizer is a {kind}, no function (parameters) -> optimizer")
