"""Command-line flags made from the keyword-only arguments of functions: each default once."""

import argparse
import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Limits:
    """From `low` to `high`, all finite, without the numbers in `without`."""

    low: float
    high: float = math.inf
    without: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high
        return inside and math.isfinite(value) and value not in self.without

    def __str__(self) -> str:
        left = "(" if self.low in self.without else "["
        right = ")" if self.high in (math.inf, *self.without) else "]"
        return f"{left}{self.low}, {self.high}{right}"


INT32 = 2**31 - 1
Fraction = Annotated[float, Limits(0, 0.999999)]
Probability = Annotated[float, Limits(0, 1)]
Factor = Annotated[float, Limits(1e-37, 1)]
NonNegative = Annotated[float, Limits(0, 1e30)]
Positive = Annotated[float, Limits(1e-30, 1e30)]
Divisor = Annotated[float, Limits(0.001, 1e30)]
Count = Annotated[int, Limits(0, INT32)]
PositiveCount = Annotated[int, Limits(1, INT32)]
Epochs = Annotated[int, Limits(1, 100_000)]
BatchSize = Annotated[int, Limits(1, 1_000_000)]


class Parser(argparse.ArgumentParser):
    """Bad input is one line on stderr and status 2."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_flags(parser: argparse.ArgumentParser, function: Callable) -> None:
    group = parser.add_argument_group(function.__name__)
    hints = typing.get_type_hints(function, include_extras=True)
    for name, default in keywords(function).items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, default=default, help="(%(default)s)", **reader(hints[name]))


def chosen(args: argparse.Namespace, function: Callable) -> dict:
    """The keyword arguments of `function` as the command line gives them."""
    return {name: getattr(args, name) for name in keywords(function)}


def keywords(function: Callable) -> dict:
    """Names and defaults of the keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def reader(hint) -> dict:
    """How argparse reads a value of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return {**reader(typing.get_args(hint)[0]), "nargs": "+"}
    if typing.get_origin(hint) is Annotated:
        kind, limits = typing.get_args(hint)
        return {"type": number(kind, limits), "metavar": kind.__name__.upper()}
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return reader(members[0]) if members else {"type": hint}


def number(kind: type, limits: Limits) -> Callable[[str], float]:
    """A function that reads a number of this type within these limits."""

    def read(text: str):
        if kind(text) not in limits:
            raise argparse.ArgumentTypeError(f"{text} is not in {limits}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse says so where the text is no number
    return read
