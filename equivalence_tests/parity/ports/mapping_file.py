"""A mapping as a JSON file that a person can read and edit.

    {"conv1.weight": {"leaf": "['params']['conv1']['kernel']", "axes": [2, 3, 1, 0]}, ...}

The leaf is the PyTorch tensor with its axes in this order, reshaped to the leaf's shape.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from equivalence_tests.parity.ports.mapping import Mapping, Piece
from flax_resnet.errors import InputError
from flax_resnet.files import replacing


def write(path: Path, mapping: Mapping, state: dict, leaves: dict):
    """Writes every tensor that fills one leaf; others are found anew when the file is read."""
    entries = {}
    for name, parts in mapping.pieces.items():
        if len(parts) == 1 and (axes := _axes(parts[0], np.shape(state[name]))) is not None:
            entries[name] = {"leaf": parts[0].leaf, "axes": axes}
    entries |= {name: None for name in mapping.unplaced}
    with replacing(path) as place:
        place.write_text(json.dumps(entries, indent=1, allow_nan=False) + "\n")


def _axes(piece: Piece, shape) -> list[int] | None:
    """The order of the tensor's axes in the leaf; None if there is none."""
    order = np.empty(len(piece.ours), int)
    if len(piece.ours) != np.prod(shape) or piece.ours.max(initial=0) >= len(order):
        return None
    order[piece.ours] = piece.theirs
    numbers = np.arange(len(order)).reshape(shape)
    for axes in itertools.permutations(range(len(shape))):
        if (numbers.transpose(axes).reshape(-1) == order).all():
            return list(axes)
    return None


def read(path: Path, state: dict, leaves: dict) -> dict[str, list[Piece]]:
    """The pieces that a file settles.

    Raises:
      InputError: the file is no mapping of these networks; the message names the entry.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: an object of tensors is expected")
    return {name: [_piece(path, name, e, state, leaves)] for name, e in entries.items() if e}


def _piece(path, name, entry, state, leaves) -> Piece:
    if name not in state:
        raise InputError(f"{path}: PyTorch's network has no {name}")
    leaf, axes = (entry.get(k) if isinstance(entry, dict) else None for k in ("leaf", "axes"))
    shape = np.shape(state[name])
    if leaf not in leaves:
        raise InputError(f"{path}: {name}: the JAX network has no leaf {leaf!r}")
    if not isinstance(axes, list) or sorted(axes) != list(range(len(shape))):
        raise InputError(f"{path}: {name}: `axes` is no order of {len(shape)} axes")
    order = np.arange(int(np.prod(shape))).reshape(shape).transpose(axes).reshape(-1)
    if order.size != np.size(leaves[leaf]):
        raise InputError(f"{path}: {name} has {order.size} elements, {leaf} another number")
    return Piece(leaf, np.arange(order.size), order)
