"""Weights files (.pth, .pt, .th) <-> plain arrays. No file is ever allowed to run code."""

import os
import re
import zipfile
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from flax_resnet.errors import InputError
from flax_resnet.files import sha256

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "model_state", "weights")
LARGEST_GROWTH = 100
"""A file whose tensors take more than this many times its own size is refused: an archive or a
tensor of stride 0 may promise terabytes."""


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a weights file under the names it gives them.

    A state_dict may lie under one of `WRAPPERS`; what lies beside it (epoch, optimizer) is left.

    Raises:
      InputError: the file is damaged, carries code, holds anything but named tensors, or is not the
        file whose SHA-256 begins as its name says (`NAME-xxxxxxxx.pth`).
    """
    _check_name(path)
    state = unwrap(load_content(path))
    wrong = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if wrong or not state:
        what = f"{wrong[0]!r} names no tensor" if wrong else "no names with tensors in it"
        raise InputError(f"{path}: not a state_dict, {what}")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if needed > LARGEST_GROWTH * os.path.getsize(path):
        raise InputError(
            f"{path}: {os.path.getsize(path)} bytes whose tensors would take {needed:.1e}; they are"
            " not read"
        )
    try:
        return to_arrays(state)
    except (TypeError, RuntimeError) as error:  # sparse, 8-bit, quantised: NumPy has no such thing
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _check_name(path: str | os.PathLike) -> None:
    wanted = re.findall(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.", os.path.basename(path))
    if not wanted:
        return
    digest = sha256(path)
    if not digest.startswith(wanted[-1]):
        raise InputError(
            f"{path}: damaged or changed, its SHA-256 is {digest[:8]}; to load it all the same,"
            f" give it a name without {wanted[-1]}"
        )


def load_content(path: str | os.PathLike):
    """The content of a file, as `torch.load` gives it on the CPU.

    Raises:
      InputError: the file is damaged, compressed or carries code.
    """
    if zipfile.is_zipfile(path):
        _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # not there, not readable: says so itself
        raise
    except Exception as error:  # torch.load on a damaged file raises nearly anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path}: holds {found[1]}, and no code of a file is run; save the weights alone:"
                " torch.save(model.state_dict(), FILE)"
            ) from error
        raise InputError(f"{path}: damaged, truncated or no file of torch.save") from error


def _check_zip(path: str | os.PathLike) -> None:
    """Sizes and checksums, at which torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch never compresses; a bomb does
            packed = [e.filename for e in archive.infolist() if e.file_size > e.compress_size]
            if packed:
                raise InputError(f"{path}: {packed[0]} is compressed, which torch.save never does")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: damaged") from error
    if wrong:
        raise InputError(f"{path}: damaged: {wrong} does not have its checksum")


def save(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a plain state_dict, as `torch.save(model.state_dict(), path)` does."""
    with open(path, "wb") as file:  # given the path, torch would write its name into the file
        torch.save(to_tensors(arrays), file)


def to_arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Contiguous copies: an array that shared a tensor's memory would change with the next step."""
    arrays = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16; float32 holds it exactly
            tensor = tensor.float()
        arrays[name] = np.array(tensor.numpy(), order="C", copy=True)
    return arrays


def to_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The inverse of `to_arrays`; copies too."""
    return {
        name: torch.from_numpy(np.array(array, order="C", copy=True))
        for name, array in arrays.items()
    }


def unwrap(content) -> Mapping:
    """The state_dict inside what was loaded; empty where there is none."""
    if not isinstance(content, Mapping):
        return {}
    inner = (content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping))
    return next(inner, content)
