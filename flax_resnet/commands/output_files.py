"""Checks of the files that a command is asked to write, before it writes anything."""

import contextlib
import itertools
import json
import os
import sys
import typing
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from flax_resnet.config import finite
from flax_resnet.errors import InputError
from flax_resnet.files import replacing


def check_outputs(
    outputs: dict[str, Path | None],
    inputs: Iterable[Path | str] = (),
    data: Iterable[Path | str] = (),
):
    """Raises InputError unless a file can be written at every path: its folder exists, no other
    flag names it, and it replaces nothing that the command reads.

    Args:
      outputs: {flag: path}; None passes, and "-" is standard output.
      inputs: files that are read, and run directories, into which nothing is written.
      data: files and folders of images, whose files stay as they are; new ones that are no images
        may join them.
    """
    given = {flag: path for flag, path in outputs.items() if path}
    for (one, path), (other, second) in itertools.combinations(given.items(), 2):
        if os.path.realpath(path) == os.path.realpath(second):
            raise InputError(f"{one} and {other} both name {path}")
    for flag, path in given.items():
        if str(path) != "-":
            _check_output(flag, path, _real(inputs), _real(data))
        elif sys.__stdout__ is None:
            raise InputError(f"{flag} -: standard output is closed")


def _real(paths: Iterable[Path | str]) -> set[Path]:
    return {Path(os.path.realpath(path)) for path in paths}


_REPORTS = (".json", ".csv", ".html")
"""Suffixes of files that hold no image, so that a report among the images may be written anew."""


def _check_output(flag: str, path: Path, inputs: set[Path], data: set[Path]):
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag}: the folder {path.absolute().parent} does not exist")
    if path.is_dir():
        raise InputError(f"{flag}: {path} is a directory")
    written = Path(os.path.realpath(path))
    places = {written, *written.parents}
    spoils = written.suffix == ".png" or (written.exists() and written.suffix not in _REPORTS)
    if inputs & places or (spoils and data & places):
        raise InputError(f"{flag}: {path} is one of the files that are read")
    if written.is_file() or not written.exists():  # the others, such as /dev/null, stay in place
        _check_writable(flag, written.parent)


def _check_writable(flag: str, folder: Path):
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{flag}: nothing can be written in {folder}")


@contextlib.contextmanager
def output(path: Path) -> Iterator[typing.TextIO]:
    """Yields a UTF-8 text file that gets its name when it is complete; "-" is standard output."""
    if str(path) == "-":
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield sys.stdout
        return
    how = {"mode": "w", "encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    path = Path(os.path.realpath(path))
    is_device = path.exists() and not path.is_file()  # or a pipe, which is not replaced either
    with contextlib.nullcontext(path) if is_device else replacing(path) as place:
        with place.open(**how) as file:
            yield file


def write_json(path: Path, values: dict):
    """Write a JSON object, with null for numbers that are not finite; "-" is standard output."""
    with output(path) as file:
        file.write(json.dumps(finite(values), indent=1, allow_nan=False) + "\n")


def check_picture(flag: str, path: Path | None):
    """Raises InputError unless the name of a picture ends in .png. None passes."""
    if path and path.suffix != ".png":
        raise InputError(f"{flag}: a picture ends in .png, got {path}")


def check_folder(flag: str, path: Path | None, own: Container[str] | None = None):
    """Raises InputError if `path` exists and is no folder that can be written in. None passes.

    Args:
      own: the names that the command writes there, where others are refused.
    """
    if path and os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{flag}: {path} is no directory")
    if path and path.exists():
        _check_writable(flag, path)
    if path and path.exists() and own is not None:
        for entry in path.iterdir():
            if entry.name not in own:
                raise InputError(f"{flag}: {path} holds {entry.name}, which is not this command's")
