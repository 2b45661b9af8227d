"""Configs as JSON values and in files."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import pydantic

from flax_resnet.config.fields import faults
from flax_resnet.config.train import TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.text import printable


def to_dict(config: TrainConfig) -> dict:
    """The config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: TrainConfig) -> dict:
    """The config as one flat dict: {"seed": 0, "model.arch": "resnet18", ...}."""
    facts = {}
    for name, value in to_dict(config).items():
        group = {f"{name}.{key}": v for key, v in value.items()} if type(value) is dict else {}
        facts |= group or {name: value}
    return facts


def differences(other: TrainConfig, own: TrainConfig) -> dict[str, str]:
    """{field: message} of the fields in which a config differs from that of a run."""
    before = flat(own)
    return {
        name: f"{name} {value!r} (the run has {before[name]!r})"
        for name, value in flat(other).items()
        if value != before[name]
    }


def finite(value):
    """The JSON value with None for every number that is not finite, which JSON cannot hold."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def from_dict(values: dict) -> TrainConfig:
    """The inverse of `to_dict`; missing fields take their defaults.

    Raises:
      InputError: an unknown key, a wrong type or a value out of range; one line names each.
    """
    try:
        text = json.dumps(values, ensure_ascii=False).encode()
        return pydantic.TypeAdapter(TrainConfig).validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object[: error.end][-30:]!a} is not in UTF-8") from None
    except pydantic.ValidationError as error:
        raise InputError(faults(error, TrainConfig)) from None


_LONGEST = 2**24  # characters: a device has no end


def config_from_file(path: Path | str) -> TrainConfig:
    """Read a config from a JSON file, strictly: known keys, each given once, with valid values."""
    values = read_object(path)
    try:
        return from_dict(values)
    except (InputError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def class_weights_from_file(path: str, class_names: Sequence[str]) -> dict[str, float]:
    """Read {class: weight} from a JSON file; names are compared in Unicode's NFC.

    Raises:
      InputError: the file is unreadable, or does not give each class a positive weight.
    """
    try:
        pairs = read_object(os.path.expanduser(path)).items()
        weights = _each_once([(normalize("NFC", name), value) for name, value in pairs])
    except ValueError as error:  # an InputError is one
        raise InputError(f"`class_weights` {error}") from None
    for name in [*class_names, *weights]:
        if (name in weights) != (name in class_names):
            fault = "is missing" if name in class_names else "is no class of the data"
            raise InputError(f"`class_weights` {path}: {printable(name)} {fault}")
        value = weights[name]
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            what = f"{printable(name)} has no positive weight: {value!r:.80}"
            raise InputError(f"`class_weights` {path}: {what}")
    return {name: float(value) for name, value in weights.items()}


def read_object(path: Path | str) -> dict:
    """The object in a JSON file; InputError if it is no such file or gives a key twice."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for ever
        raise InputError(f"{path} is no file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            values = json.loads(file.read(_LONGEST), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values


def _each_once(pairs: list[tuple]) -> dict:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{printable(name)} is given twice")
        values[name] = value
    return values
