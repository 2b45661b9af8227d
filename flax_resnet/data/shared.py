"""Arrays and names that worker processes map into memory instead of copying them."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_SMALL = 1 << 16  # bytes of an array that is pickled as it is


class SharedArrays:
    """Base of a dataclass whose pickle refers to its large arrays, for processes of one machine.

    The arrays are in files without a name, which vanish with this process.
    """

    def __getstate__(self) -> dict:
        files = self.__dict__.setdefault("_files", {})
        state = {name: value for name, value in vars(self).items() if name != "_files"}
        for name, value in state.items():
            if isinstance(value, np.ndarray) and value.nbytes > _SMALL and _has_places():
                if name not in files:
                    files[name] = _written(value)
                state[name] = _Place(files[name].fileno(), value.dtype.str, value.shape)
        return state


@dataclass(frozen=True)
class _Place:
    """The reference to an array in a pickle."""

    descriptor: int
    dtype: str
    shape: tuple[int, ...]

    def __reduce__(self):
        path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        return np.memmap, (path, self.dtype, "r", 0, self.shape)


def _has_places() -> bool:
    """True if other processes can open a file that has no name."""
    return os.path.isdir("/proc/self/fd")


def _written(array: np.ndarray):
    file = tempfile.TemporaryFile()
    np.ascontiguousarray(array).tofile(file)
    file.flush()
    return file


@dataclass(frozen=True, eq=False)
class Names(SharedArrays, Sequence):
    """A sequence of file names, stored in two arrays."""

    text: np.ndarray
    """The bytes of all names, one after another, uint8."""

    ends: np.ndarray
    """The end of each name in `text`, int64 [N]."""

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        """Make the sequence from strings."""
        return Names.of_bytes([os.fsencode(name) for name in names])

    @staticmethod
    def of_bytes(encoded: list[bytes]) -> "Names":
        """Make the sequence from encoded strings."""
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return Names(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())

    def __eq__(self, other) -> bool:
        return tuple(self) == tuple(other)

    def at(self, indices: Iterable[int]) -> "Names":
        """The names at these indices, in their order."""
        encoded = self.encoded()
        return Names.of_bytes([encoded[index] for index in indices])

    def encoded(self) -> list[bytes]:
        """All names as bytes; of a million names much faster than one by one."""
        text, ends = self.text.tobytes(), self.ends.tolist()
        return [text[start:end] for start, end in pairwise([0, *ends])]
