"""Functions that keep other libraries quiet and check where they store files."""

import contextlib
import logging

from flax_resnet.errors import InputError


@contextlib.contextmanager
def quiet(name: str):
    """Lets a library log nothing but errors within the context."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_home(folder: str, source: str, variable: str):
    """Raises InputError for a folder in the user's home if there is no home: `~` would be the name
    of a folder.

    Args:
      folder: after `os.path.expanduser`.
      variable: environment variable that names another folder.
    """
    if folder.startswith("~"):
        raise InputError(f"{source}: there is no home directory; set {variable} to a folder")
