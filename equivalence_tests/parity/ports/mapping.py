"""The mapping tells where in JAX each element of a PyTorch tensor is."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Elements of a PyTorch tensor that are elements of a JAX leaf."""

    leaf: str

    ours: np.ndarray
    """Their numbers in the leaf, flat."""

    theirs: np.ndarray
    """Their numbers in the tensor, flat."""


class Mapping(NamedTuple):
    """The place of every tensor of PyTorch in JAX."""

    pieces: dict[str, list[Piece]]

    unplaced: dict[str, tuple[int, ...]]
    """Tensors of PyTorch, with shapes, that have no place in JAX."""

    extra: dict[str, tuple[int, ...]]
    """Float leaves of JAX, with shapes, that no tensor of PyTorch fills."""

    ambiguous: list[str]
    """Sentences that name what could be matched otherwise."""

    shared: dict[str, str]
    """{tensor of PyTorch: leaf of JAX in its place, which another tensor fills}."""

    def has(self, name: str, numbers: np.ndarray) -> bool:
        """Returns True if any of these elements of a tensor has a place."""
        return any(np.isin(numbers, piece.theirs).any() for piece in self.pieces.get(name, ()))

    def holds(self, leaf: str, numbers: np.ndarray) -> bool:
        """Returns True if any of these elements of a leaf is one of PyTorch's."""
        return any(
            np.isin(numbers, piece.ours).any() for piece in self.parts() if piece.leaf == leaf
        )

    def parts(self) -> Iterator[Piece]:
        """All pieces."""
        return itertools.chain.from_iterable(self.pieces.values())

    def copies(self) -> dict[str, int]:
        """{tensor of PyTorch: number of its copies in JAX}, where there are several."""
        found = {}
        for name, parts in self.pieces.items():
            count = np.unique(np.concatenate([p.theirs for p in parts]), return_counts=True)[1]
            found |= {name: int(count.max())} if count.max(initial=0) > 1 else {}
        return found

    def read(self, name: str, leaves: dict, shape) -> np.ndarray | None:
        """A tensor of PyTorch, read from leaves of JAX; None if it has no place there."""
        found = np.full(int(np.prod(shape)), np.nan)
        for piece in self.pieces.get(name, ()):
            found[piece.theirs] = np.asarray(leaves[piece.leaf]).reshape(-1)[piece.ours]
        return None if name not in self.pieces else found.reshape(shape)

    def gradient(self, name: str, leaves: dict, shape) -> np.ndarray:
        """The gradient of a tensor: the sum over its copies of the gradients of leaves."""
        found = np.zeros(int(np.prod(shape)))  # elements that no layer reads have no gradient
        for piece in self.pieces[name]:
            part = np.asarray(leaves[piece.leaf]).reshape(-1)[piece.ours]
            np.add.at(found, piece.theirs, part)
        return found.reshape(shape)


def put(leaves: dict, piece: Piece, tensor):
    """Writes the elements of one piece into its leaf."""
    flat = leaves[piece.leaf].reshape(-1)
    flat[piece.ours] = np.asarray(tensor).reshape(-1)[piece.theirs]
    leaves[piece.leaf] = flat.reshape(leaves[piece.leaf].shape)


def filled(walk, pieces: dict[str, list[Piece]]) -> dict:
    """The walk's leaves with some pieces of PyTorch's tensors in them."""
    leaves = dict(walk.leaves)
    for name, parts in pieces.items():
        for piece in parts:
            leaves[piece.leaf] = np.array(leaves[piece.leaf])
            put(leaves, piece, walk.state[name])
    return leaves


def pieces_of(theirs: dict, ours: dict) -> dict[str, list[Piece]]:
    """Pieces of two layers whose positions are the same."""
    found = {}
    for name, left in theirs.items():
        for leaf, right in ours.items():
            both = (left >= 0) & (right >= 0)
            if both.any():
                found.setdefault(name, []).append(piece_of(leaf, right[both], left[both]))
    return found


def piece_of(leaf: str, ours: np.ndarray, theirs: np.ndarray) -> Piece:
    """A piece with each pair of elements once; a network may read an element many times."""
    if np.bincount(ours - ours.min(initial=0)).max(initial=0) > 1:
        _, first = np.unique(ours * (theirs.max() + 1) + theirs, return_index=True)
        ours, theirs = ours[first], theirs[first]
    return Piece(leaf, ours, theirs)
