"""Reads files of weights as arrays; the first bytes of a file tell its format, not its name."""

import json
import re
import stat
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from flax_resnet.errors import InputError
from flax_resnet.files import sha256
from flax_resnet.weights import names, torch_file

_LARGEST_HEADER = 100_000_000
"""Most bytes of the table of contents of a .safetensors file, as its library has it."""

_UNSUPPORTED = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: git lfs pull",
    b"\x89HDF": "an HDF5 file; weights of Keras are not read",
    b"\x80": "a pickle, but not of torch.save",
    b"<": "a web page",
}


def read(path: Path) -> tuple[dict[str, np.ndarray], bool]:
    """Read all tensors of a file.

    Returns:
      {name: array}, with names of nested mappings joined by "/"; and whether the file has checksums
      and they were verified.

    Raises:
      InputError: the file is missing, damaged, cut off or in no known format.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no regular file")
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith((torch_file.ZIP_START, torch_file.LEGACY_START)):
            return torch_file.read(path), start.startswith(torch_file.ZIP_START)
        if start[8:9] == b"{":
            return _read_safetensors(path), False
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    what = next((text for magic, text in _UNSUPPORTED.items() if start.startswith(magic)), "")
    what = what or ("" if start else "it is empty")
    kinds = "neither a file of torch.save nor a .safetensors file"
    raise InputError(f"{path}: {kinds}{': ' * bool(what)}{what}")


def load(path: Path, key: str | None = None, *, ema: bool = False) -> tuple[dict, str]:
    """Read the weights in a file.

    Returns:
      {name: array} under torchvision's names, and a line for the user, which may be "".

    Raises:
      InputError: as in `read` and `names.choose`, or the file has another SHA-256 than its name
        says.
    """
    arrays, has_checksums = read(path)
    if fault := fault_by_name(path, path.name):
        raise InputError(
            f"{path}: damaged or changed: {fault}; to load it all the same, give it a name without"
            f" {digest_in_name(path.name)}"
        )
    if not arrays:
        raise InputError(f"{path}: the file has no tensor")
    if list(arrays) == [""]:
        raise InputError(f"{path}: a single tensor without a name, not the weights of a network")
    try:
        choice = names.choose(arrays, key, ema=ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    checked = not has_checksums and digest_in_name(path.name)
    remarks = [str(choice), "its SHA-256 is that of its name" if checked else ""]
    remark = "; ".join(filter(None, remarks))
    return choice.arrays, f"{path.name}: {remark}" if remark else ""


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > size - 8:
                raise InputError(f"{path}: truncated, its table of contents is incomplete")
            if length > _LARGEST_HEADER:
                raise InputError(f"{path}: its table of contents takes {length:,} bytes")
            header = json.loads(file.read(length))
        entries = [value for name, value in header.items() if name != "__metadata__"]
        if len(entries) > torch_file.MOST_TENSORS:
            raise InputError(f"{path}: more than {torch_file.MOST_TENSORS:,} tensors")
        if size != 8 + length + max((e["data_offsets"][1] for e in entries), default=0):
            raise InputError(f"{path}: truncated, or longer than its table of contents says")
        return load_file(path)
    except (InputError, OSError):
        raise
    except Exception:  # safetensors' own exceptions have no common base
        raise InputError(
            f"{path}: a damaged .safetensors file, or one with unsupported types"
        ) from None


def digest_in_name(name: str) -> str:
    """The start of the SHA-256 in a file's name, as torch.hub's files have it; "" without one."""
    return next(reversed(re.findall(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", name)), "")


def fault_by_name(path: Path, name: str) -> str:
    """Why the content of a file is not that of the digest in its name; "" if it is, or without
    one."""
    wanted = digest_in_name(name)
    if not wanted or (digest := sha256(path)).startswith(wanted):
        return ""
    return f"its name says SHA-256 {wanted}, it has {digest[:8]}"
