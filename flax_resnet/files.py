"""Files that are complete or not there at all, and lines of CSV."""

import contextlib
import csv
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`, with the same suffix; the file replaces
    `path` unless the body fails."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp{path.suffix[:20]}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors creates files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CsvRows:
    """Writes rows of CSV, whose lines end with a line feed."""

    def __init__(self, file: TextIO):
        kinds = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        self._plain, self._quoted = (
            csv.writer(file, lineterminator="\n", quoting=k) for k in kinds
        )

    def write(self, row: Iterable):
        """Write a row. Python 3.11 puts no quotes around a carriage return, which ends a line."""
        values = list(row)
        returns = any(isinstance(value, str) and "\r" in value for value in values)
        (self._quoted if returns else self._plain).writerow(values)
