"""Command-line flags made from the keyword-only arguments of functions: each default once."""

import argparse
import inspect
import typing
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Bad input is one line on stderr and status 2."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_flags(parser: argparse.ArgumentParser, function: Callable) -> None:
    group = parser.add_argument_group(function.__name__)
    hints = typing.get_type_hints(function)
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
        return {"type": typing.get_args(hint)[0], "nargs": "+"}
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return reader(members[0]) if members else {"type": hint}
