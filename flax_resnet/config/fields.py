"""Types of settings: bounds that a compiled step can take, and the checked dataclass."""

import dataclasses
import difflib
import functools
import re
from typing import Annotated, TypeVar, dataclass_transform

import pydantic
from pydantic import Field

from flax_resnet.errors import InputError
from flax_resnet.text import listed

T = TypeVar("T")


_MOST_WORDS = 40
"""Most valid words that a message lists; train.py has over a hundred flags."""


def nearest(word: str, valid) -> str:
    """The end of an error message: "; did you mean X?", or the list of valid words."""
    close = difflib.get_close_matches(str(word), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {listed(valid, _MOST_WORDS)}"


INT32 = 2**31 - 1
"""The largest number that a compiled step counts to."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Bounds of the numbers that a compiled step takes; float32 holds them and their reciprocals."""


def _zero_or_normal(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"must be 0 or at least {SMALLEST:g}: float32 rounds smaller numbers to 0")
    return value


def _writable(text: str) -> str:
    """Raises ValueError for a name that config.json cannot hold, and for an empty one."""
    if not text:
        raise ValueError("the name is empty")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the name is not in UTF-8 or holds a NUL: rename the file or folder")
    return text


Name = Annotated[str, pydantic.AfterValidator(_writable)]
# The largest value is below 1 in float32 too, so that 1 - value is never 0.
Fraction = Annotated[float, Field(ge=0, le=0.999999)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST), pydantic.AfterValidator(_zero_or_normal)]
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
Factor = Annotated[float, Field(ge=1e-37, le=1)]
Count = Annotated[int, Field(ge=0, le=INT32)]
PositiveCount = Annotated[int, Field(ge=1, le=INT32)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]

_make_dataclass = pydantic.dataclasses.dataclass(
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True),
)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def dataclass(cls: type[T]) -> type[T]:
    """A frozen, checked dataclass, which type checkers understand as one. Wrong values raise an
    InputError of one line, where pydantic has an error of its own of several lines."""
    made = _make_dataclass(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def __init__(self, *args, **values):
        try:
            checked(self, *args, **values)
        except pydantic.ValidationError as error:
            raise InputError(faults(error, made)) from None

    made.__init__ = __init__
    return made


def faults(error: pydantic.ValidationError, made: type | None = None) -> str:
    """The faults in one line, with each field's name in backticks.

    Args:
      made: the dataclass, whose groups are searched for the name of an unknown field.
    """
    return "; ".join(_describe(fault, made) for fault in error.errors())


def _describe(fault: dict, made: type | None) -> str:
    names = [part for part in fault["loc"] if isinstance(part, str)]
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "unexpected_keyword_argument" and made:
        return _unknown(names, made)
    if not names or isinstance(fault["input"], dict):
        return message  # it concerns a whole group and names the fields
    if fault["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        return f"`{names[-1]}`: unknown {fault['input']!r}{nearest(fault['input'], valid)}"
    return f"`{names[-1]}`: {message}, got {fault['input']!r:.80}"


def _unknown(names: list[str], made: type) -> str:
    """The message about a keyword that is no field: it belongs to a group, or is misspelt."""
    *groups, name = names
    for group in groups:
        made = made.__dataclass_fields__[group].type
    kinds = {field.name: field.type for field in dataclasses.fields(made)}
    for group, kind in kinds.items():
        if dataclasses.is_dataclass(kind) and name in kind.__dataclass_fields__:
            return f"`{name}` is a field of a group: {group}={{{name!r}: ...}}"
    return f"unknown field {'.'.join([*groups, name])!r}{nearest(name, kinds)}"
