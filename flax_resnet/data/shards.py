"""Image files in ArrayRecord shards, which Grain reads at random, with an index of their labels.

A record is the content of an image file and nothing else. The folder of the shards also holds
`index.json`, which is an `Index`, and `SHA256SUMS`, which the program sha256sum checks.
"""

import bisect
import glob
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from grain.sources import ArrayRecordDataSource
from pydantic.dataclasses import dataclass

from flax_resnet.config import INT32
from flax_resnet.errors import InputError
from flax_resnet.files import sha256
from flax_resnet.text import listed, printable

INDEX, CHECKSUMS = "index.json", "SHA256SUMS"

_OPTIONS = "group_size:1,uncompressed"  # images are compressed, and are read one by one
_Number = Annotated[int, pydantic.Field(ge=0)]
_Class = Annotated[int, pydantic.Field(ge=0, le=INT32)]


@dataclass(frozen=True)
class Shard:
    """A shard as the index describes it."""

    split: Literal["train", "validation", "test"]
    size: _Number
    """Size of the file in bytes."""

    runs: list[tuple[_Class, _Number]]
    """Classes of the images in their order, as (class, number of images in a row)."""

    @property
    def labels(self) -> np.ndarray:
        """The classes of the images, int32 [N]."""
        classes, lengths = np.array(self.runs, np.int32).reshape(-1, 2).T
        return np.repeat(classes, lengths)


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    class_names: list[str]
    channels: Literal[1, 3]
    shards: dict[str, Shard]
    """The shards by their file names, each split in its order."""


class Found(NamedTuple):
    """The shards of a data set."""

    index: Index
    splits: dict[str, tuple["Records", np.ndarray]]
    """{split: its records, and their classes int32 [N]}."""

    checksum: str
    """SHA-256 of the checksums of all shards."""


class _Part(NamedTuple):
    """A whole shard, as ArrayRecordDataSource takes it without opening the file."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


class Records(Sequence):
    """The records of shards as bytes.

    Raises:
      InputError: a record cannot be read; its shard is named.
    """

    def __init__(self, paths: list[str], lengths: list[int]):
        self._paths, self._ends = paths, list(itertools.accumulate(lengths))
        parts = [_Part(path, n, n) for path, n in zip(paths, lengths, strict=True)]
        self._source = ArrayRecordDataSource(parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        try:
            record = self._source[index]
        except RuntimeError as error:  # ArrayRecord's checksum of the record is wrong
            reason = " ".join(str(error).split())
        else:
            if record:
                return record
            reason = "an empty record"
        path = self._paths[bisect.bisect_right(self._ends, index)]
        raise InputError(f"{printable(path, 1000)}: a broken shard ({printable(reason)})")


def read(place: str) -> Found:
    """Open the shards in a folder, or the splits that a pattern such as `DIR/train-*` matches.

    Raises:
      InputError: no shards, a split without some of its shards, an index that was changed, or a
        shard of another size than in the index. A change that keeps the size raises when its
        record is read.
    """
    folder, names = _matched(os.path.expanduser(place))
    index, checksum = _read_index(folder)
    splits = {}
    for name, shard in index.shards.items():
        splits.setdefault(shard.split, {})[name] = shard
    splits = {split: shards for split, shards in splits.items() if names & shards.keys()}
    if not splits:
        raise InputError(f"arrayrecord:{place}: no shard of {folder / INDEX}")
    for shards in splits.values():
        _check_shards(folder, shards, names)
    opened = {split: _open(folder, shards) for split, shards in splits.items()}
    return Found(index, opened, checksum)


def _matched(place: str) -> tuple[Path, set[str]]:
    """The folder of the shards, and the names of the files that the place means."""
    pattern = os.path.join(glob.escape(place), "*") if os.path.isdir(place) else place
    paths = [Path(path) for path in glob.glob(pattern)]
    folders = sorted({path.parent for path in paths})
    if len(folders) != 1:
        found = (
            f"files of {len(folders)} folders, and one folder holds a set" if paths else "no file"
        )
        raise InputError(f"arrayrecord:{place}: {found}")
    return folders[0], {path.name for path in paths}


def _read_index(folder: Path) -> tuple[Index, str]:
    try:
        for path in (folder / INDEX, folder / CHECKSUMS):
            if path.exists() and not path.is_file():  # a pipe would wait for ever
                raise InputError(f"{path} is no file")
        content, sums = ((folder / name).read_bytes() for name in (INDEX, CHECKSUMS))
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; `flax-resnet shards` writes it beside the shards"
        ) from None
    if _checksum_line(content, INDEX) not in sums.decode(errors="replace").splitlines(True):
        raise InputError(f"{folder / INDEX}: changed since it was written: {CHECKSUMS} differs")
    try:
        index = pydantic.TypeAdapter(Index).validate_json(content)
    except pydantic.ValidationError:
        raise InputError(f"{folder / INDEX}: no index of shards") from None
    for name, shard in index.shards.items():
        if sum(length for _, length in shard.runs) > shard.size:
            raise InputError(f"{folder / INDEX}: more images than bytes in {printable(name)}")
    return index, hashlib.sha256(sums).hexdigest()


def _check_shards(folder: Path, shards: dict[str, Shard], names: set[str]):
    if missing := sorted(shards.keys() - names):
        raise InputError(
            f"{folder}: {len(missing)} of {len(shards)} shards missing: {listed(missing)}"
        )
    for name, shard in shards.items():
        if (size := os.path.getsize(folder / name)) != shard.size:
            raise InputError(
                f"{folder / name}: a broken shard ({size:,} bytes instead of {shard.size:,})"
            )
        _check_count(folder / name, sum(length for _, length in shard.runs))


def _check_count(path: Path, expected: int):
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: a broken shard ({printable(reason)})") from None
    if count != expected:
        raise InputError(f"{path}: {count:,} images instead of the {expected:,} of {INDEX}")


def _open(folder: Path, shards: dict[str, Shard]) -> tuple[Records, np.ndarray]:
    labels = [shard.labels for shard in shards.values()]
    records = Records([str(folder / name) for name in shards], list(map(len, labels)))
    return records, np.concatenate(labels)


def write(
    folder: Path,
    splits: dict[str, tuple[Iterable[bytes], np.ndarray]],
    images_per_shard: int,
    *,
    class_names: Sequence[str],
    channels: int,
) -> Iterator[tuple[str, int]]:
    """Write the shards of a data set, their index and their checksums.

    Args:
      folder: an empty folder.
      splits: {split: its image files, and their classes `[N]`}.

    Yields:
      The name of each shard and its number of images, when it is complete.
    """
    shards, sums = {}, []
    for split, (files, labels) in splits.items():
        count = math.ceil(len(labels) / images_per_shard)
        files = iter(files)
        for number, part in enumerate(np.array_split(labels, count)):
            name = f"{split}-{number:05}-of-{count:05}.array_record"
            _write_records(folder / name, itertools.islice(files, len(part)))
            shards[name] = Shard(split, os.path.getsize(folder / name), _runs(part))
            sums.append(f"{sha256(folder / name)}  {name}\n")
            yield name, len(part)
    index = Index(list(class_names), channels, shards)
    content = json.dumps(asdict(index), allow_nan=False).encode()
    (folder / INDEX).write_bytes(content)
    (folder / CHECKSUMS).write_text("".join([*sums, _checksum_line(content, INDEX)]))


def _checksum_line(content: bytes, name: str) -> str:
    """A line of `SHA256SUMS`."""
    return f"{hashlib.sha256(content).hexdigest()}  {name}\n"


def _write_records(path: Path, records: Iterable[bytes]):
    try:
        writer = ArrayRecordWriter(str(path), _OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # a full disk
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None


def _runs(labels: np.ndarray) -> list[tuple[int, int]]:
    return [(int(label), len(list(same))) for label, same in itertools.groupby(labels)]
