"""A mapping as a JSON file that a person can read and edit.

    {"conv1.weight": {"leaf": "['params']['conv1']['kernel']", "axes": [2, 3, 1, 0]},
     "attention.in_proj_weight": [
      {"leaf": "['params']['query']['kernel']", "shape": [8, 8], "tensor": [0, [1, 8]],
       "place": [0, [8, 1]]}, ...],
     "old.weight": null}

A tensor that fills a leaf lies in it with its axes in this order, reshaped to the leaf's shape. Any
other tensor is a list of blocks. Element [i, j] of a block of the given shape is element
start + i * steps[0] + j * steps[1] of the flat PyTorch tensor (`tensor`: [start, steps]) and of the
flat leaf (`place`). A tensor of null, or one that is not in the file, is found anew.
"""

import itertools
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from equivalence_tests.parity.ports.mapping import Mapping, Piece
from flax_resnet.config.files import read_object
from flax_resnet.errors import InputError
from flax_resnet.files import replacing


def write(path: Path, mapping: Mapping, state: dict):
    """Writes every tensor that has a place, one to a line."""
    entries = {
        name: _entry(parts, np.shape(state[name])) for name, parts in mapping.pieces.items()
    } | dict.fromkeys(mapping.unplaced)
    lines = [
        f" {json.dumps(name, allow_nan=False)}: {_text(entry)}" for name, entry in entries.items()
    ]
    with replacing(path) as place:
        place.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _text(entry) -> str:
    if isinstance(entry, list):
        return (
            "[\n"
            + ",\n".join(f"  {json.dumps(block, allow_nan=False)}" for block in entry)
            + "\n ]"
        )
    return json.dumps(entry, allow_nan=False)


def _entry(parts: list[Piece], shape):
    if len(parts) == 1 and (axes := _axes(parts[0], shape)) is not None:
        return {"leaf": parts[0].leaf, "axes": axes}
    return [block for piece in parts for block in _blocks(piece)]


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


def _blocks(piece: Piece) -> list[dict]:
    """The piece as blocks: one, unless its elements do not lie at regular steps."""
    order = np.argsort(piece.ours)
    left, found = np.stack([piece.theirs[order], piece.ours[order]], 1), []
    while len(left):
        size, shape, steps = _grid(left)
        start = left[0].tolist()
        theirs, ours = ([start[side], [step[side] for step in steps]] for side in (0, 1))
        found.append({"leaf": piece.leaf, "shape": shape, "tensor": theirs, "place": ours})
        left = left[size:]
    return found


def _grid(numbers: np.ndarray) -> tuple[int, list[int], list[list[int]]]:
    """The longest block [n, 2] with which numbers begin: its size, shape and steps."""
    size, shape, steps = 1, [], []
    while size < len(numbers):
        rows = len(numbers) // size
        whole = numbers[: rows * size].reshape(rows, size, 2)
        step = whole[1, 0] - whole[0, 0] if rows > 1 else None
        if step is None:
            break
        regular = (whole == whole[0] + np.arange(rows)[:, None, None] * step).all((1, 2))
        count = rows if regular.all() else int(np.argmin(regular))
        if count == 1:
            break
        size, shape, steps = size * count, [count, *shape], [step.tolist(), *steps]
    return size, shape or [1], steps or [[1, 1]]


def read(path: Path, state: dict, leaves: dict) -> dict[str, list[Piece]]:
    """The pieces that a file settles.

    Raises:
      InputError: the file is no mapping of these networks; the message names the entry.
    """
    found, taken = {}, {}
    for name, entry in read_object(path).items():
        try:
            found[name] = _pieces(name, entry, state, leaves)
            _take(taken, name, found[name], state, leaves)
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    return {name: parts for name, parts in found.items() if parts}


def _pieces(name, entry, state, leaves) -> list[Piece]:
    if name not in state:
        raise InputError("PyTorch's network has no such tensor")
    if entry is None:
        return []
    if np.asarray(state[name]).dtype.kind != "f":
        raise InputError("this tensor holds no floats, so it has no place")
    if isinstance(entry, list):
        return [_block(block, np.size(state[name]), leaves) for block in entry]
    leaf, axes = _of(entry, "leaf", "axes")
    size, shape = _size(leaf, leaves), np.shape(state[name])
    if not isinstance(axes, list) or not _order(axes, len(shape)):
        raise InputError(f"`axes` is no order of {len(shape)} axes")
    order = np.arange(math.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
    if order.size != size:
        raise InputError(f"it has {order.size} elements, {leaf} has {size}")
    return [Piece(leaf, np.arange(order.size), order)]


def _order(axes, rank: int) -> bool:
    return all(_whole(axis) for axis in axes) and sorted(axes) == list(range(rank))


def _whole(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _of(entry, *keys) -> list:
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise InputError(f"an object with {', '.join(keys)} is expected")
    return [entry[key] for key in keys]


def _size(leaf, leaves) -> int:
    if not isinstance(leaf, str) or leaf not in leaves:
        raise InputError(f"the JAX network has no leaf {leaf!r}")
    if not jnp.issubdtype(jnp.result_type(leaves[leaf]), jnp.floating):
        raise InputError(f"{leaf} holds no floats")
    return int(np.size(leaves[leaf]))


def _block(entry, size: int, leaves) -> Piece:
    leaf, shape, *sides = _of(entry, "leaf", "shape", "tensor", "place")
    sizes = size, _size(leaf, leaves)
    if not isinstance(shape, list) or not all(_whole(n) and n > 0 for n in shape):
        raise InputError(f"`shape` is {shape!r}, no list of lengths")
    if math.prod(shape) > min(sizes):
        raise InputError(f"a block has {math.prod(shape)} elements, more than tensor or leaf")
    theirs, ours = (
        _numbers(word, side, shape, most)
        for word, side, most in zip(("tensor", "place"), sides, sizes, strict=True)
    )
    return Piece(leaf, ours, theirs)


def _numbers(word: str, side, shape: list[int], size: int) -> np.ndarray:
    """Numbers of a block's elements in a flat array of this size."""
    start, steps = side if isinstance(side, list) and len(side) == 2 else (None, None)
    fits = isinstance(steps, list) and len(steps) == len(shape)
    if not fits or not all(_whole(n) and abs(n) <= size for n in (start, *steps)):
        raise InputError(f"`{word}` is {side!r}, not [start, one step for each length]")
    grid = np.indices(shape).reshape(len(shape), -1)
    numbers = start + np.asarray(steps, int) @ grid
    if numbers.min() < 0 or numbers.max() >= size:
        raise InputError(f"`{word}` reaches beyond the {size} elements")
    return numbers


def _take(taken: dict, name: str, parts: list[Piece], state, leaves):
    """Raises InputError where an element of a tensor or of a leaf is taken a second time."""
    own = np.zeros(np.size(state.get(name)), bool)
    for piece in parts:
        place = taken.setdefault(piece.leaf, np.zeros(np.size(leaves[piece.leaf]), bool))
        sides = ("the tensor", own, piece.theirs), (piece.leaf, place, piece.ours)
        for what, marks, numbers in sides:
            if marks[numbers].any() or len(np.unique(numbers)) < len(numbers):
                raise InputError(f"elements of {what} are taken twice")
            marks[numbers] = True
