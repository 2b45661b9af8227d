"""Networks and other objects that a user names as "package.module:callable"."""

import importlib
import re
import sys

from flax_resnet.errors import InputError

_DROPS = re.compile(r"(drop(out|path|connect|block)|stochastic_?depth)(_?\dd)?$", re.IGNORECASE)


def load(place: str, flag: str):
    """Imports `place`, "package.module:callable", and returns what the callable returns.

    Raises:
      InputError: the callable cannot be imported, or raises; the error names `flag` and `place`.
    """
    found = find(place, flag)
    try:
        return found()
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise InputError(f"{flag} {place} raises {type(error).__name__}: {error}") from error


def find(place: str, flag: str):
    """Imports `place`, "package.module:name", and returns the object itself.

    Raises:
      InputError: there is no such object, or its module raises.
    """
    module_name, _, name = place.partition(":")
    if not name:
        raise InputError(
            f"{flag} {place}: the name behind ':' is missing (package.module:callable)"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the working directory, as python -m has it
    try:
        return getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error} (package.module:callable)"
        raise InputError(f"{flag} {place}: {reason}") from error


def drops(part) -> bool:
    """Returns True if a layer drops values at random, judged by the name of its class."""
    return bool(_DROPS.search(type(part).__name__))
