"""The order in which a kernel takes its inputs: flattened images, turned pixels."""

import itertools

import numpy as np

from equivalence_tests.parity.ports import layers
from equivalence_tests.parity.ports.layers import Layer
from equivalence_tests.parity.ports.mapping import Mapping, Piece, filled, pieces_of
from equivalence_tests.parity.ports.walk import Walk, closest


def flattened(walk: Walk, layer: Layer, subject: Layer) -> dict[str, np.ndarray]:
    """The kernel's numbers in the order in which JAX flattens the layer's input.

    PyTorch flattens [C, H, W]; JAX may flatten [H, W, C]. The order with which JAX computes most
    nearly what PyTorch computes is taken.
    """
    image = _image_below(walk, layer) if len(layers.shape(layer)) == 2 else None
    if image is None:
        return layer.parameters
    trials = []
    for axes in itertools.permutations(range(3)):
        order = np.arange(np.prod(image)).reshape(image).transpose(axes).reshape(-1)
        moved = {n: numbers[:, order] for n, numbers in layer.parameters.items()}
        pieces = pieces_of(moved, subject.parameters)
        got = walk.in_jax(subject.output, filled(walk, pieces))
        trials.append((closest(walk.in_torch(layer.output), got)[0], moved))
    return min(trials, key=lambda trial: trial[0])[1]


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
        if len(shape) == 4 and min(shape[2:]) > 1:
            found += _turned_pixels(name, numbers // shape[3] % shape[2], numbers % shape[3])
        elif len(shape) == 2 and not _in_order(numbers % shape[1]):
            found.append(f"{name} takes its inputs in another order: JAX flattens another layout")
    return found


def _as_it_lies(piece: Piece, leaf_shape) -> np.ndarray:
    """The numbers of a tensor's elements in the part of the leaf that they fill."""
    order = np.argsort(piece.ours)
    places = np.unravel_index(piece.ours[order], leaf_shape)
    return piece.theirs[order].reshape([len(np.unique(place)) for place in places])


def _in_order(columns: np.ndarray) -> bool:
    """True if the columns of a matrix lie in their own order along every axis of their leaf."""
    first = [columns.take(0, axis) for axis in range(columns.ndim)]
    return all((np.diff(part.reshape(-1)) >= 0).all() for part in first)


def _turned_pixels(name: str, rows: np.ndarray, columns: np.ndarray) -> list[str]:
    down, across = (np.flatnonzero([np.ptp(a, i).any() for i in range(a.ndim)])
                    for a in (rows, columns))  # fmt: skip
    if len(down) == len(across) == 1 and down[0] > across[0]:
        return [f"{name} lies in its leaf with height and width swapped"]
    if rows.flat[0] > 0 or columns.flat[0] > 0:
        return [f"{name} lies in its leaf rotated by 180 degrees"]
    return []
