"""Prints names of tensors, files and classes, which come from outside, safely and in brief."""

import re
import sys
from collections.abc import Iterable
from typing import TextIO

_PASSWORD = re.compile(r"(?<=://)[^/\s@]*@")

_verbose = False


def be_verbose(on: bool):
    """Set for the whole process whether names and lists are shown in full, however long."""
    global _verbose
    _verbose = on


def most(limit: int) -> int:
    """The limit on what is shown, or no limit if the process is verbose."""
    return sys.maxsize if _verbose else limit


def printable(text: object, limit: int = 200) -> str:
    r"""The text with control characters and marks of writing direction escaped, as `\x1b` and
    `\u202e`, and without the name and password of a URL.

    Args:
      limit: characters of the result; a longer one is cut and ends with "...".
    """
    limit = most(limit)
    start = _PASSWORD.sub("***@", str(text))[: limit + 1]
    shown = "".join(map(_escaped, start))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def say(*lines: object, file: TextIO | None = None):
    """Print lines, `printable` and whole, to standard output or a file."""
    for line in lines:
        print(printable(line, sys.maxsize), file=file or sys.stdout, flush=True)


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first `limit` names, printable, and the number of the others: `a, b and 3,700 more`."""
    names, limit = list(names), most(limit)
    shown = ", ".join(printable(name) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown


def _escaped(character: str) -> str:
    if character.isprintable():  # false for control, format, surrogate and odd space characters
        return character
    return character.encode("unicode_escape").decode("ascii")
