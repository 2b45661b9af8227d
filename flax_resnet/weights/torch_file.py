"""Reads files of `torch.save` as arrays, without PyTorch.

A file names the functions that build its objects. Only those in `_KNOWN` are called, and they only
record where a tensor is. The checksums of the zip are verified first; the format before torch 1.6
has none.
"""

import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_resnet.errors import InputError
from flax_resnet.text import listed, printable

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number

LARGEST_GROWTH = 100
"""Largest size of the tensors relative to the file; stride 0 could make them terabytes."""

MOST_TENSORS = 100_000
"""Most tensors of a file; the largest network here has 932, and Adam's state twice as many."""

DEEPEST = 100
"""Most levels of nested mappings."""

LONGEST_NAME = 1_000
"""Most characters of a name; a long key of a mapping would be copied for each tensor in it."""

_ADVICE = (
    "no code in a file is run; save the weights alone with the program that wrote it:"
    " torch.save(model.state_dict(), FILE)"
)


class _Foreign(Exception):
    """Raised for an object that is neither a tensor nor a number, text or container."""


class _Damaged(Exception):
    """Raised for a file that contradicts itself."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a file; the names of nested mappings and lists are joined by "/".

    Raises:
      InputError: the file is damaged or cut off, or holds an object that is no tensor, number or
        text.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(ZIP_START)) == ZIP_START
            file.seek(0)
            return _read_zip(file) if is_zip else _read_legacy(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except _Foreign as error:
        what = printable(error)
        raise InputError(f"{path}: holds {what}, which is not read: {_ADVICE}") from None
    except EOFError:
        raise InputError(f"{path}: truncated, its end is missing") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f": {printable(error)}" if isinstance(error, _Damaged) else ""
        raise InputError(f"{path}: damaged{reason}") from None


def _read_zip(file) -> dict[str, np.ndarray]:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise EOFError from None  # the table of contents is at the end, which is missing
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if any(re.fullmatch(r"[^/]*/constants\.pkl", name) for name in names):
        raise InputError(
            "a TorchScript program, not weights; save its weights:"
            " torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        )
    # torch never compresses; a file that unpacks to gigabytes does.
    if packed := [e.filename for e in entries if e.compress_type or e.file_size > e.compress_size]:
        raise InputError(f"{listed(packed, 1)} compressed, which torch.save never does")
    roots = [m[1] for name in names if (m := re.fullmatch(r"([^/]*)/data\.pkl", name))]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise InputError("a zip file, but not of torch.save")
    if wrong := archive.testzip():
        raise _Damaged(f"{wrong} does not have its checksum")
    root = roots[0]
    with archive.open(f"{root}/data.pkl") as pickled:
        content = _Unpickler(pickled).load()
    order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in names else b"little"
    read = lambda storage: archive.read(f"{root}/data/{storage.key}")  # noqa: E731
    return _arrays(content, read, order.decode(), _size(file))


def _read_legacy(file) -> dict[str, np.ndarray]:
    """Read the format before torch 1.6: pickles, then the storages in the order of their list."""
    file.seek(len(LEGACY_START))
    protocol, system = (_Unpickler(file).load() for _ in range(2))
    if protocol != 1001:
        raise _Damaged("its protocol is not 1001")
    unpickler = _Unpickler(file)
    content, keys = unpickler.load(), _Unpickler(file).load()
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(unpickler.storages):
        raise _Damaged("its list of storages differs from that of its tensors")
    data = {}
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(_exactly(file, 8), "little") != storage.size:
            raise _Damaged(f"storage {key} has another size than its tensor")
        data[key] = _exactly(file, storage.size * storage.dtype.itemsize)
    if file.read(1):
        raise _Damaged("there are bytes after its end")
    order = "little" if system["little_endian"] else "big"
    return _arrays(content, lambda storage: data[storage.key], order, _size(file))


def _exactly(file, count: int) -> bytes:
    if count > _size(file) or len(content := file.read(count)) < count:
        raise EOFError
    return content


def _size(file) -> int:
    return os.fstat(file.fileno()).st_size


def _arrays(content, read: Callable[[_Storage], bytes], byteorder: str, size: int) -> dict:
    """Copies of the tensors in the unpickled content; each storage is read once."""
    tensors = _tensors_in(content)
    needed = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    if needed > LARGEST_GROWTH * size:
        raise InputError(f"{size} bytes whose tensors would take {needed:.1e}; they are not read")
    flat = {}
    for storage in {t.storage for t in tensors.values()}:
        values = np.frombuffer(read(storage), storage.dtype.newbyteorder(byteorder))
        if len(values) != storage.size:
            raise _Damaged(f"storage {storage.key} has another size than its tensor")
        flat[storage] = values.astype(storage.dtype, copy=False)
    return {name: _strided(tensor, flat[tensor.storage]) for name, tensor in tensors.items()}


def _strided(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    _, offset, shape, strides = tensor
    if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
        raise _Damaged("a tensor of negative sizes")
    if 0 in shape:
        return np.zeros(shape, values.dtype)
    if offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= len(values):
        raise _Damaged("a tensor that exceeds its storage")
    in_bytes = [step * values.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, in_bytes).copy()


def _tensors_in(content) -> dict[str, _Tensor]:
    """{path: tensor} of all tensors in the content; a tensor in two places has its first path."""
    found, seen, waiting = {}, set(), [("", "", 0, content)]
    while waiting:
        above, key, depth, value = waiting.pop()
        name = _joined(above, key, depth)
        if isinstance(value, _Tensor):
            if name in found:
                raise InputError(f"two entries are called {printable(name)!r}")
            if len(found) == MOST_TENSORS:  # one tensor of the file may have many names
                raise InputError(f"more than {MOST_TENSORS:,} entries")
            found[name] = value
        elif id(value) not in seen:
            seen.add(id(value))
            if depth == DEEPEST:
                raise InputError(f"nested more than {DEEPEST} deep")
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            # The list is a stack: the first item is taken next.
            waiting += [(name, k, depth + 1, v) for k, v in reversed(items) if _holds_tensors(v)]
    return found


def _holds_tensors(value) -> bool:
    return isinstance(value, dict | list | tuple)  # a tensor here is a tuple


def _joined(above: str, key, depth: int) -> str:
    name = f"{above}/{key}" if depth > 1 else str(key)
    if len(name) > LONGEST_NAME:
        raise InputError(f"a name of more than {LONGEST_NAME:,} characters: {printable(name, 60)}")
    return name


def _tensor(storage, offset, shape, strides, _=False, hooks=(), marks=None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _Damaged("a tensor without a storage")
    if marks:  # such as {"neg": True}: the values are those of the storage, negated
        raise _Foreign("a tensor that is computed from its storage when it is read")
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _ordered(items=()) -> OrderedDict:
    """Python 2 gives the items to the constructor."""
    for key, _ in items:
        _check_key(key)
    return OrderedDict(items)


def _first(value, *_):
    return value


def _called(function, _, arguments, *__):
    return function(*arguments)


def _nothing(*_):
    """Stands for functions whose objects are harmless and not needed."""


def _number(dtype, *_):
    raise _Foreign(f"numpy.{np.dtype(dtype).name}")


def _array_of_numpy(*_):
    raise _Foreign("numpy.ndarray")


_STORAGES = {
    "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": jnp.bfloat16,
    "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8,
    "Bool": np.bool_,
}  # fmt: skip

_KNOWN = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": _nothing,  # milestones of a schedule
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _called,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch.Size": _nothing,
    "torch.device": _nothing,
    "builtins.set": _nothing,
    "__builtin__.set": _nothing,
    "_codecs.encode": _nothing,
    "numpy.dtype": _first,
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array_of_numpy for core in ("core", "_core")},
    **{f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _STORAGES.items()},
    **{f"torch.cuda.{kind}Storage": np.dtype(dtype) for kind, dtype in _STORAGES.items()},
    **{f"torch.{np.dtype(dtype).name}": None for dtype in _STORAGES.values()},
}


def _check_key(key):
    """Raises InputError for a key of nested tuples that would take for ever to hash or print: a few
    bytes of a file make a tuple of itself twice, and so on."""
    waiting, size = [key] if isinstance(key, tuple) else [], 0
    while waiting:
        value = waiting.pop()
        size += 1 + (len(value) if isinstance(value, str | bytes | tuple) else 0)
        if size > LONGEST_NAME:
            raise InputError(f"a key of more than {LONGEST_NAME:,} parts")
        if isinstance(value, tuple):
            waiting += value


def _with_checked_keys(load, keys: slice):
    """A method of the unpickler that checks the keys on the stack first."""

    def checked(self):
        for key in self.stack[keys]:
            _check_key(key)
        load(self)

    return checked


class _Whole:
    """A file whose reads are complete or raise EOFError."""

    def __init__(self, file):
        self._file = file

    def read(self, count):
        content = self._file.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def readline(self):
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line


class _Unpickler(pickle._Unpickler):
    """An unpickler in Python; the one in C allocates whatever size a file states."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file):
        super().__init__(_Whole(file))
        self.storages: dict[str, _Storage] = {}
        self._tensors = 0

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full not in _KNOWN:
            raise _Foreign(full)
        return _KNOWN[full]

    def persistent_load(self, pid):
        _, dtype, key, _, size, *view = pid
        self._tensors += 1
        if self._tensors > MOST_TENSORS:
            raise InputError(f"more than {MOST_TENSORS:,} tensors")
        if not isinstance(key, str) or not isinstance(dtype, np.dtype) or any(view):
            raise _Foreign("a storage of another kind")
        storage = _Storage(key, dtype, int(size))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise _Damaged(f"storage {key} has two sizes")
        return storage

    def _load_build(self):
        self.stack.pop()  # drops attributes of an object, such as an OrderedDict's _metadata

    def _load_set(self):
        self.pop_mark()
        self.append(None)

    dispatch |= {
        pickle.BUILD[0]: _load_build,
        # Sets are not needed, and their items would be hashed.
        pickle.EMPTY_SET[0]: lambda self: self.append(None),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: _load_set,
        pickle.SETITEM[0]: _with_checked_keys(pickle._Unpickler.load_setitem, slice(-2, -1)),
        pickle.SETITEMS[0]: _with_checked_keys(pickle._Unpickler.load_setitems, slice(0, None, 2)),
        pickle.DICT[0]: _with_checked_keys(pickle._Unpickler.load_dict, slice(0, None, 2)),
    }
