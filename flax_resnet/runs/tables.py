"""The CSVs of a run: a row an epoch is appended to two copies, and a digest of them stands in every
checkpoint, so that a copy that was damaged or deleted is noticed and written anew from the other.
Neither costs more as the run gets longer."""

import csv
import hashlib
import io
import os
from pathlib import Path

from flax_resnet.errors import InputError


class Table:
    """A CSV of numbers that grows by rows."""

    def __init__(self, *copies: Path):
        self.copies = copies
        self._columns, self._size, self._sha = None, 0, hashlib.sha256()

    def start(self, content: bytes):
        """Let the table be this: of the copies, those that are otherwise are written anew."""
        for path in self.copies:
            if not content:
                path.unlink(missing_ok=True)
            elif read(path) != content:
                write(path, content)
        self._columns = next(csv.reader([content.decode().split("\n")[0]]), None)
        self._size, self._sha = len(content), hashlib.sha256(content)

    def append(self, row: dict):
        """Add a row; the first one names the columns."""
        lines = io.StringIO(newline="")
        columns = self._columns or list(row)
        writer = csv.DictWriter(lines, columns, lineterminator="\n", extrasaction="ignore")
        if not self._columns:
            writer.writeheader()
        writer.writerow(row)
        content = lines.getvalue().encode()
        for path in self.copies:
            with path.open("ab") as file:
                file.write(content)
        self._columns, self._size = columns, self._size + len(content)
        self._sha.update(content)

    def mark(self) -> dict:
        """What a checkpoint remembers of the table as it is now."""
        return {"bytes": self._size, "sha256": self._sha.hexdigest()}

    def rows(self) -> list[dict]:
        """All rows, from the first copy that is as it was written; the others are written anew."""
        content = self.recover(self.mark())
        if content is None:
            return []
        self.start(content)
        return parse(content, self.copies[0])

    def recover(self, mark: dict) -> bytes | None:
        """The table as it was at a mark, from the first copy that still has it; None: lost."""
        return next((c for c in (at(path, mark) for path in self.copies) if c is not None), None)


def at(path: Path, mark: dict) -> bytes | None:
    """The content of a copy up to a mark; None where that is not what was written."""
    content = (read(path) or b"")[: mark["bytes"]]
    return content if hashlib.sha256(content).hexdigest() == mark["sha256"] else None


def read(path: Path) -> bytes | None:
    """The content of a file; None of what is no file or cannot be read."""
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None


def write(path: Path, content: bytes):
    """Replace a file in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_rows(path: Path) -> list[dict]:
    """A CSV of numbers -> rows; [] where there is no file.

    Raises:
      InputError: it holds something else; the file is named.
    """
    return parse(path.read_bytes(), path) if path.exists() else []


def parse(content: bytes, path: Path) -> list[dict]:
    """The rows of a CSV of numbers; `path` is named where it is none."""
    try:
        lines = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        return [{name: _number(value) for name, value in row.items()} for row in lines]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise InputError(f"{path} holds no numbers in columns: {error}") from None


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def as_csv(rows: list[dict]) -> bytes:
    """A header and a line a row."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue().encode(errors="surrogateescape")  # names of folders are bytes
