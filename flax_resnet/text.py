"""Words from outside (names of tensors, files and classes) on their way to a terminal."""

import sys
from collections.abc import Iterable

_verbose = False


def be_verbose(on: bool):
    """Whether names and lists are shown in full, however long: of the whole process."""
    global _verbose
    _verbose = on


def most(limit: int) -> int:
    """As many of a list as are shown: all where everything is."""
    return sys.maxsize if _verbose else limit


def printable(text: object, limit: int = 200) -> str:
    r"""A text without the characters that steer a terminal or turn the direction of what follows:
    they are escaped, as `\x1b` and `\u202e`.

    Args:
      limit: characters of the result, of which the last three are dots where more was left out.
    """
    limit = most(limit)
    start = str(text)[: limit + 1]
    shown = "".join(map(_escaped, start))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def listed(names: Iterable[object], limit: int = 5) -> str:
    """Printable names between commas, the first of them where they are many, with the number of
    the others: `a, b, c, d, e and 3,700 more`."""
    names, limit = list(names), most(limit)
    shown = ", ".join(printable(name) for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more:,} more" if more > 0 else shown


def _escaped(character: str) -> str:
    if character.isprintable():  # False of control, format, surrogate and odd space characters
        return character
    return character.encode("unicode_escape").decode("ascii")
