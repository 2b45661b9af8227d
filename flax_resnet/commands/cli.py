"""Flags of the commands: those of the config, those that several commands share."""

import argparse
import dataclasses
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import pydantic

from flax_resnet import text
from flax_resnet.config import INT32, TrainConfig, config_from_file, idle, nearest, to_dict
from flax_resnet.config.fields import faults
from flax_resnet.errors import InputError
from flax_resnet.imagenet_recipes import IMAGENET_RECIPES
from flax_resnet.recipes import RECIPES

BAD_IMAGE = "error: unreadable images end the command; skip: they are listed and left out"
FOLD_BATCHNORM = "fold BatchNorm into the convolutions: faster, equal up to rounding"
WEIGHTS_KEY = "key or prefix of the network to take, in a file that holds several"
RUN_OR_NAME = "run directory, or name of weights: torchvision:ARCH, timm:NAME, hf:OWNER/REPO"
AVERAGE = "with several runs, what is averaged: probabilities (default) or logits"
EMA = "take the averaged weights, in a file that holds raw ones too"


ALL_RECIPES = RECIPES | IMAGENET_RECIPES
SMOKE = {"epochs": "1", "batch_size": "16", "data": {"train_images": "32", "eval_images": "32"}}


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises InputError, with the nearest valid name, for a mistake."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )
        self.add_argument("--verbose", action="store_true", help="show every list in full")

    def format_help(self):
        """The help text: what the command does, examples, usage, flags."""
        words = [action.metavar or action.dest for action in self._get_positional_actions()]
        self.usage = " ".join([self.prog, *words, "[flags]"])
        about, self.description = self.description or "", None
        if self.prog.startswith("flax-resnet "):  # not in a checkout
            about = re.sub(r"python scripts/(\w+)\.py", _subcommand, about)
        flags, self.description = super().format_help(), about
        return f"{about.strip()}\n\n{flags}"

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        _check_words(args)
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=", 1)[0]
            hint = nearest(word, self._option_string_actions) if word.startswith("-") else ""
            raise InputError(f"unknown argument {word!r}{hint}")
        text.be_verbose(namespace.verbose)
        return namespace

    def error(self, message):
        raise InputError(message)


def _subcommand(script: re.Match) -> str:
    return f"flax-resnet {script[1].replace('_', '-')}"


def _check_words(words: Iterable[str]):
    """Raises InputError for an empty word, such as a shell makes of "$RUN" where RUN is not set: no
    flag takes one, and as a path it would be the working directory."""
    flag = ""
    for word in words:
        if not word or (word.startswith("-") and word.partition("=")[1:] == ("=", "")):
            raise InputError(f"an empty word is given{f' after {flag}' if flag else ''}")
        flag = word


def add_starting_points(parser: argparse.ArgumentParser):
    """The flags that `build_config` starts from."""
    parser.add_argument("--config", metavar="PATH", help="start from the settings in a config.json")
    parser.add_argument("--recipe", metavar="NAME", help="start from a recipe's settings")
    parser.add_argument("--smoke", action="store_true", help="try all stages on 32 images")


def add_config_flags(
    parser: argparse.ArgumentParser,
    only: tuple[str, ...] | None = None,
    hidden: tuple[str, ...] = (),
):
    """Add a flag for every field of `TrainConfig` and its groups, with None for flags not given.

    Args:
      only: names of the fields to add; their help names no defaults, which the command infers.
      hidden: names of the fields that the help leaves out, because the command refuses them.
    """
    for group, fields in _fields().items():
        fields = [field for field in fields if only is None or field.name in only]
        section = parser.add_argument_group(group.replace("_", " ") or "run") if fields else None
        for field in fields:
            shape = _argument(field, with_default=only is None)
            shape |= {"help": argparse.SUPPRESS} if field.name in hidden else {}
            section.add_argument(_flag(field.name), default=None, **shape)


def requested_values(args: argparse.Namespace) -> dict:
    """The flags that were given, nested as in `config.to_dict`; values are still strings."""
    values = {}
    for group, fields in _fields().items():
        given = {f.name: v for f in fields if (v := getattr(args, f.name, None)) is not None}
        if given and group:
            values[group] = given
        else:
            values.update(given)
    return values


def merge(base: TrainConfig, values: dict) -> TrainConfig:
    """A config with some fields replaced; strings are converted to the fields' types.

    Raises:
      InputError: a value is invalid; the message names its flag, and for a name the nearest valid
        one.
    """
    merged = to_dict(base)
    for key, value in values.items():
        merged[key] = merged[key] | value if isinstance(value, dict) else value
    try:
        return pydantic.TypeAdapter(TrainConfig).validate_python(merged)
    except pydantic.ValidationError as error:
        raise InputError(as_flags(faults(error))) from None


def with_flags(base: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """The config of a file or recipe, changed by the flags. Its settings that lose their effect by
    the flags take their defaults."""
    config = merge(base, requested_values(args))
    left = idle(config).keys() - idle(base).keys()
    left = {name for name in left if getattr(args, name, None) is None}
    groups = {k: v for k, v in to_dict(TrainConfig()).items() if isinstance(v, dict)}
    return merge(config, {k: {n: v[n] for n in left & v.keys()} for k, v in groups.items()})


def build_config(args: argparse.Namespace, otherwise: TrainConfig) -> TrainConfig:
    """Builds the config from --config or --recipe, else `otherwise`; then --smoke, then the flags.

    Raises:
      InputError: as `merge` and `config_from_file` do, or for an unknown recipe.
    """
    config = merge(_starting_point(args, otherwise), SMOKE if args.smoke else {})
    return with_flags(config, args)


def _starting_point(args: argparse.Namespace, otherwise: TrainConfig) -> TrainConfig:
    if args.config and args.recipe:
        raise InputError("--config and --recipe exclude each other")
    if args.recipe:
        check_choice("--recipe", args.recipe, ALL_RECIPES)
        return ALL_RECIPES[args.recipe].config
    return config_from_file(args.config) if args.config else otherwise


def check_start(recipe: str | None, config: TrainConfig):
    """Raises InputError if a training by a recipe lacks the weights that the recipe starts from."""
    start = ALL_RECIPES[recipe].starts_from if recipe else None
    if start and not config.init_from:
        raise InputError(
            f"--recipe {recipe} starts from the weights of {start}: give a run of that recipe with"
            " --init-from"
        )


def check_choice(flag: str, value: str, valid):
    """Raises InputError, naming the nearest valid value, unless `value` is one."""
    if value not in valid:
        raise InputError(f"{flag}: unknown {value!r}{nearest(value, valid)}")


def distinct(runs: Iterable[Path | str]) -> list[Path | str]:
    """The runs, each once however its path is written."""
    found = {}
    for run in runs:
        found.setdefault(os.path.realpath(run), run)
    return [*found.values()]


def chosen_average(average: str | None, valid: tuple[str, ...], runs: Iterable[Path | str]) -> str:
    """The value of --average, by default the first valid one; InputError for an unknown word, or
    for any word where there is one run."""
    if average is not None:
        check_choice("--average", average, valid)
        if len(distinct(runs)) == 1:
            raise InputError("--average has no effect with one run")
    return average or valid[0]


def check_positive(flag: str, value: int | None, most: int = INT32):
    """Raises InputError below 1 or above `most`. None passes."""
    if value is not None and value < 1:
        raise InputError(f"{flag}: at least 1, got {value}")
    if value is not None and value > most:
        raise InputError(f"{flag}: at most {most:,}, got {value}")


def as_flags(line: str) -> str:
    """A message of the library with its settings, such as `batch_size`, written as flags."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda name: _flag(name[1]), line)


def _fields() -> dict[str, list[dataclasses.Field]]:
    """{group: its fields}; the group "" holds the fields of `TrainConfig` itself."""
    groups = {"": []}
    for field in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(field.type):
            groups[field.name] = list(dataclasses.fields(field.type))
        else:
            groups[""].append(field)
    return groups


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_METAVARS = {int: "INT", float: "FLOAT", "dataset": "NAME[:PATH]", "init_from": "WEIGHTS"}


def _argument(field: dataclasses.Field, *, with_default: bool) -> dict:
    """The arguments of `add_argument` for a field; pydantic checks the value later."""
    kind = _unwrap(field.type)
    default = field.default if field.default is not dataclasses.MISSING else None
    default = getattr(default, "default", default)
    names = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    about = as_flags(_help_texts()[field.name]).replace("%", "%%").replace("\n", " ")
    about = about.removesuffix(".") + (f": {', '.join(names)}" if len(names) > 6 else "")
    about += f" (default: {_plain(default)})" if with_default and default is not None else ""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": about}
    if typing.get_origin(kind) is tuple:
        (item, *_) = typing.get_args(kind)
        return {"nargs": "+", "metavar": _METAVARS[_unwrap(item)], "help": about}
    if 0 < len(names) <= 6:
        return {"metavar": "|".join(map(str, names)), "help": about}
    return {"metavar": _METAVARS.get(kind) or _METAVARS.get(field.name, "NAME"), "help": about}


@functools.cache
def _help_texts() -> dict[str, str]:
    """The docstrings under the fields, which pydantic has collected."""
    schema = pydantic.TypeAdapter(TrainConfig).json_schema()
    definitions = [schema, *schema["$defs"].values()]
    return {
        name: properties.get("description", "")
        for definition in definitions
        for name, properties in definition["properties"].items()
    }


def _unwrap(kind):
    """The type X in Annotated[X | None, ...]."""
    if typing.get_origin(kind) is typing.Annotated:
        return _unwrap(typing.get_args(kind)[0])
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return _unwrap(next(a for a in typing.get_args(kind) if a is not type(None)))
    return kind


def _plain(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
