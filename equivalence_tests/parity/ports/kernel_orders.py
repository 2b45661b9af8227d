"""The order in which a kernel takes its inputs: flattened images, turned pixels."""

import itertools

import numpy as np

from equivalence_tests.parity.ports import layers
from equivalence_tests.parity.ports.layers import Layer
from equivalence_tests.parity.ports.layouts import closest
from equivalence_tests.parity.ports.mapping import Mapping, Piece, filled, pieces_of
from equivalence_tests.parity.ports.walk import Walk


def placed(walk: Walk, layer: Layer, subject: Layer) -> dict[str, list[Piece]]:
    """The pieces of a kernel of PyTorch in one of JAX.

    PyTorch flattens [C, H, W], of an image or of a patch that a convolution sees; JAX may flatten
    [H, W, C]. The order with which JAX computes most nearly what PyTorch computes is taken.
    """
    theirs, ours = layers.shape(layer), layers.shape(subject)
    if layers.matrix(theirs) != layers.matrix(ours):
        return {}
    if len(theirs) == len(ours):
        image = _image_below(walk, layer) if len(theirs) == 2 else None
        if image is None:
            same = theirs == ours
            return pieces_of(layer.parameters, subject.parameters) if same else {}
    else:
        image = max(theirs, ours, key=len)[1:]
    trials = []
    for axes in itertools.permutations(range(3)):
        sides = [layer.parameters, subject.parameters]
        turned = len(ours) == 4
        sides[turned] = {n: _columns(a, image, axes) for n, a in sides[turned].items()}
        pieces = pieces_of(*sides)
        got = walk.in_jax(subject.output, filled(walk, pieces))
        trials.append((closest(walk.in_torch(layer.output), got)[0], pieces))
    return min(trials, key=lambda trial: trial[0])[1]


def _columns(numbers: np.ndarray, image, axes) -> np.ndarray:
    """A kernel as a matrix whose inputs are an image with its axes in this order."""
    whole = numbers.reshape(len(numbers), *image).transpose(0, *(1 + axis for axis in axes))
    return whole.reshape(len(numbers), -1)


def _image_below(walk: Walk, layer: Layer) -> tuple[int, int, int] | None:
    """The shape [C, H, W] from which the input of a dense layer was flattened; else None."""
    graph, producers = walk.standard, walk.standard.producers()
    value, moved = graph.operations[layer.operation].inputs[0], False
    while len(shape := np.shape(walk.in_torch(value))) != 4:
        index = producers.get(value)
        if index is None or graph.operations[index].name not in layers.MOVES:
            return None
        value, moved = graph.operations[index].inputs[0], True
    several = moved and np.prod(shape[2:]) > 1
    columns = layers.shape(layer)[1]
    return shape[1:] if several and np.prod(shape[1:]) == columns else None


def turned(mapping: Mapping, state: dict, leaves: dict) -> list[str]:
    """Kernels whose inputs lie in their leaf in another order than PyTorch's, one sentence each."""
    found = []
    for name, pieces in mapping.pieces.items():
        shape = np.shape(state[name])
        if len(pieces) != 1 or len(shape) not in (2, 4):
            continue
        numbers = _as_it_lies(pieces[0], np.shape(leaves[pieces[0].leaf]))
        if numbers is None:
            continue
        if len(shape) == 4 and min(shape[2:]) > 1:
            places = np.unravel_index(numbers, shape)[1:]
            found += _turned_patch(name, *places) or _turned_pixels(name, *places[1:])
        elif len(shape) == 2 and not _in_order(numbers % shape[1]):
            found.append(f"{name} takes its inputs in another order: JAX flattens another layout")
    return found


def _as_it_lies(piece: Piece, leaf_shape) -> np.ndarray | None:
    """The numbers of a tensor's elements in the part of the leaf that they fill; None if that part
    is no block."""
    order = np.argsort(piece.ours)
    places = np.unravel_index(piece.ours[order], leaf_shape)
    block = [len(np.unique(place)) for place in places]
    return piece.theirs[order].reshape(block) if len(order) == np.prod(block) else None


def _in_order(columns: np.ndarray) -> bool:
    """True if the columns of a matrix lie in their own order along every axis of their leaf."""
    first = [columns.take(0, axis) for axis in range(columns.ndim)]
    return all((np.diff(part.reshape(-1)) >= 0).all() for part in first)


def _turned_patch(name: str, *places: np.ndarray) -> list[str]:
    """A sentence if channels and pixels of a patch lie along one axis in another order."""
    along = [np.flatnonzero([np.ptp(a, i).any() for i in range(a.ndim)]) for a in places]
    if any(len(axes) != 1 or axes != along[0] for axes in along):
        return []
    lines = [np.moveaxis(a, along[0][0], 0).reshape(a.shape[along[0][0]], -1)[:, 0] for a in places]
    slowness = [np.flatnonzero(line != line[0])[0] for line in lines]
    names = [AXES[i] for i in np.argsort(slowness)[::-1]]
    return [] if names == list(AXES) else [
        f"{name} takes the values of a patch in the order {', '.join(names)}"
    ]  # fmt: skip


AXES = "channel", "row", "column"


def _turned_pixels(name: str, rows: np.ndarray, columns: np.ndarray) -> list[str]:
    down, across = (np.flatnonzero([np.ptp(a, i).any() for i in range(a.ndim)])
                    for a in (rows, columns))  # fmt: skip
    if len(down) == len(across) == 1 and down[0] > across[0]:
        return [f"{name} lies in its leaf with height and width swapped"]
    if rows.flat[0] > 0 or columns.flat[0] > 0:
        return [f"{name} lies in its leaf rotated by 180 degrees"]
    return []
