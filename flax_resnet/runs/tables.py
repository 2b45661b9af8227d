"""The CSV tables of a run, with a row for each epoch.

Rows are appended to two copies, and every checkpoint holds a digest, so that a damaged or deleted
copy is noticed and restored from the other. The cost of a row does not grow with the table.
"""

import csv
import hashlib
import io
import os
from pathlib import Path

from flax_resnet.errors import InputError, no_link
from flax_resnet.files import CsvRows


class Table:
    """A CSV table of numbers, in one or more copies, that grows by rows."""

    def __init__(self, *copies: Path):
        self.copies = copies
        self._columns, self._size, self._sha = None, 0, hashlib.sha256()

    def start(self, content: bytes):
        """Set the content of the table; copies that differ are written."""
        for path in self.copies:
            if not content:
                path.unlink(missing_ok=True)
            elif path.is_symlink() or read(path) != content:
                write(path, content)
        self._columns = next(csv.reader([content.decode().split("\n")[0]]), None)
        self._size, self._sha = len(content), hashlib.sha256(content)

    def append(self, row: dict):
        """Append a row; the first row names the columns."""
        lines = io.StringIO(newline="")
        columns = self._columns or list(row)
        writer = csv.DictWriter(lines, columns, lineterminator="\n", extrasaction="ignore")
        if not self._columns:
            writer.writeheader()
        writer.writerow(row)
        content = lines.getvalue().encode()
        for path in self.copies:
            with open(path, "ab", opener=no_link) as file:
                file.write(content)
        self._columns, self._size = columns, self._size + len(content)
        self._sha.update(content)

    def mark(self) -> dict:
        """The size and digest of the table, with which a checkpoint finds its content again."""
        return {"bytes": self._size, "sha256": self._sha.hexdigest()}

    def rows(self) -> list[dict]:
        """All rows, from the first undamaged copy; damaged copies are restored."""
        content = self.recover(self.mark())
        if content is None:
            return []
        self.start(content)
        return parse(content, self.copies[0])

    def recover(self, mark: dict) -> bytes | None:
        """The content of the table at a mark, from the first copy that has it, or None."""
        return next((c for c in (at(path, mark) for path in self.copies) if c is not None), None)


def at(path: Path, mark: dict) -> bytes | None:
    """The content of a copy up to a mark, or None if it is damaged."""
    content = (read(path) or b"")[: mark["bytes"]]
    return content if hashlib.sha256(content).hexdigest() == mark["sha256"] else None


def read(path: Path) -> bytes | None:
    """The content of a file, or None if it is no file or unreadable."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def write(path: Path, content: bytes):
    """Replace a file, or a link to one, atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)  # of a run that was killed, or a link
    with open(temporary, "xb") as file:
        file.write(content)
    os.replace(temporary, path)


def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV of numbers, [] without a file; InputError if it holds something else."""
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise InputError(f"{path} is no file")
    return parse(path.read_bytes(), path) if path.exists() else []


def parse(content: bytes, path: Path) -> list[dict]:
    """The rows of a CSV of numbers; InputError, naming `path`, if the content is something else."""
    try:
        lines = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        return [{name: _number(value) for name, value in row.items()} for row in lines]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{path} holds no numbers in columns: {error}") from None


def _number(text: str) -> int | float:
    whole = text.lstrip("-").isdigit() and len(text) < 19  # a longer one may be no float
    return int(text) if whole else float(text)


def as_csv(rows: list[dict]) -> bytes:
    """The rows as CSV, with a header."""
    lines = io.StringIO(newline="")
    table = CsvRows(lines)
    for row in (rows[0], *(row.values() for row in rows)):
        table.write(row)
    # Class names are names of folders, which may hold any bytes.
    return lines.getvalue().encode(errors="surrogateescape")
