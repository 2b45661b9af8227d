"""Reader of CIFAR-10's two official archives (https://www.cs.toronto.edu/~kriz/cifar.html).

Nothing is unpacked and no code in a file runs: members are read in memory by their expected names
and sizes, by an unpickler that only knows NumPy arrays.
"""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np

from flax_resnet.errors import InputError

ARCHIVE_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
MAX_FILE_BYTES = 40 * 2**20  # the largest real file has 31,035,704

CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_EXPECTED = frozenset(
    name + suffix for name in (*_TRAIN, _TEST) for suffix in ("", ".bin")
) | {"batches.meta", "batches.meta.txt"}  # fmt: skip

_PIXELS = 3 * 32 * 32

# The globals of a pickled array. Python 2 wrote numpy.core, NumPy 2 writes numpy._core, and pickles
# that Python 3 writes for Python 2 rebuild bytes with _codecs.encode.
_reconstruct = np.zeros(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.numeric", "_frombuffer"): np.zeros(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}

Split = tuple[np.ndarray, np.ndarray]  # images uint8 [N, 32, 32, 3], labels int32 [N]


def read(path: str | Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Read the training split, the test split and the class names.

    Args:
      path: an official archive, python or binary; a folder that holds one; a folder with its
        files unpacked; or a folder above that.

    Raises:
      InputError: there is no CIFAR-10, the MD5 is not the official one, a file is missing, too
        large or no CIFAR-10 batch, or a pickle asks for anything but arrays.
    """
    files = _read_files(Path(os.path.expanduser(path)))
    suffix = ".bin" if "data_batch_1.bin" in files else ""
    missing = [name + suffix for name in (*_TRAIN, _TEST) if name + suffix not in files]
    if missing:
        raise InputError(f"cifar10:{path}: {', '.join(missing)} not found")
    names = _class_names(files)
    parse = _parse_binary if suffix else _parse_pickle
    parts = [parse(name, files[name + suffix]) for name in (*_TRAIN, _TEST)]
    for name, (_, labels) in zip((*_TRAIN, _TEST), parts, strict=True):
        if labels.min() < 0 or labels.max() >= len(names):
            raise InputError(f"{name}: a label is outside 0..{len(names) - 1}")
    images, labels = zip(*parts[:-1], strict=True)
    return (np.concatenate(images), np.concatenate(labels)), parts[-1], names


def _read_files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return _read_archive(path)
    for folder in (path, *(path / name for name in FOLDERS)):
        if any((folder / name).is_file() for name in ("data_batch_1", "data_batch_1.bin")):
            return _read_folder(folder)
    for name in ARCHIVE_MD5:
        if (path / name).is_file():
            return _read_archive(path / name)
    raise InputError(
        f"cifar10:{path}: no CIFAR-10 here; give {' or '.join(ARCHIVE_MD5)} "
        "or the folder that it unpacks to"
    )


def _read_folder(folder: Path) -> dict[str, bytes]:
    paths = [folder / name for name in sorted(_EXPECTED) if (folder / name).is_file()]
    for path in paths:
        _check_size(path, path.stat().st_size)
    return {path.name: path.read_bytes() for path in paths}


def _read_archive(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 not in ARCHIVE_MD5.values():
            expected = ARCHIVE_MD5.get(path.name, " or ".join(ARCHIVE_MD5.values()))
            raise InputError(f"{path}: MD5 is {md5}, not {expected}; download it again")
        file.seek(0)
        files = {}
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and folder in FOLDERS and name in _EXPECTED:
                    _check_size(f"{path}: {member.name}", member.size)
                    files[name] = archive.extractfile(member).read()
        return files


def _check_size(name: str | Path, num_bytes: int):
    if num_bytes > MAX_FILE_BYTES:
        raise InputError(f"{name}: {num_bytes} bytes are too many for a CIFAR-10 file")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise InputError(f"asks for {module}.{name}, which no CIFAR-10 file needs")
        return _ALLOWED[module, name]


def _unpickle(name: str, content: bytes) -> dict[str, object]:
    try:
        values = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: values[key] for key in values}
    except Exception as error:  # a broken pickle can raise anything
        raise InputError(f"{name}: not a CIFAR-10 file ({error})") from None


def _parse_pickle(name: str, content: bytes) -> Split:
    values = _unpickle(name, content)
    try:
        images = np.asarray(values["data"])
        labels = np.asarray(values["labels"], dtype=np.int32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}: not a CIFAR-10 batch ({error!r})") from None
    right_shape = labels.ndim == 1 and labels.size and images.shape == (labels.size, _PIXELS)
    if images.dtype != np.uint8 or not right_shape:
        raise InputError(
            f"{name}: not a CIFAR-10 batch ({images.dtype} {images.shape}, {labels.shape} labels)"
        )
    return _to_images(images), labels


def _parse_binary(name: str, content: bytes) -> Split:
    if not content or len(content) % (1 + _PIXELS):
        raise InputError(f"{name}: not a CIFAR-10 batch ({len(content)} bytes)")
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return _to_images(rows[:, 1:]), rows[:, 0].astype(np.int32)


def _to_images(rows: np.ndarray) -> np.ndarray:
    """Reshape rows [N, 3072], stored channel by channel, to images [N, 32, 32, 3]."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _class_names(files: dict[str, bytes]) -> tuple[str, ...]:
    if "batches.meta.txt" in files:
        return _decode("batches.meta.txt", files["batches.meta.txt"].split())
    if "batches.meta" not in files:
        return CLASS_NAMES
    names = _unpickle("batches.meta", files["batches.meta"]).get("label_names", CLASS_NAMES)
    return _decode("batches.meta", names)


def _decode(file: str, names) -> tuple[str, ...]:
    try:
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    except (TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a CIFAR-10 file ({error})") from None
