"""Reads a user's converter of weights by sending a number of its own through every element."""

import jax
import numpy as np
import torch

from equivalence_tests.parity.ports.mapping import Mapping, Piece
from flax_resnet.errors import InputError
from flax_resnet.text import listed

BASE = 128
"""Numbers go through digit by digit, so that a converter may round to bfloat16, which holds
integers up to 256."""


def pieces(
    converter, state: dict[str, np.ndarray], variables, aliases: dict[str, str], needed: set[str]
) -> dict[str, list[Piece]]:
    """Finds the place to which each element of the state goes.

    Args:
      converter: takes a PyTorch state_dict; returns variables with the structure of `variables`.
      aliases: {another name of a tensor of the state: its name in the state}.
      needed: names of the tensors that need a place in JAX.

    Raises:
      InputError: the converter raises, returns another structure, computes with the numbers
        instead of moving them, or sends two elements to one place, or a needed one nowhere.
    """
    starts, total = {}, 1  # 0 is what a converter fills in by itself
    for name, array in state.items():
        starts[name] = total
        total += array.size if _converted(array) else 0
    places = [1]
    while places[-1] * BASE < total:
        places.append(places[-1] * BASE)
    digits = [_through(converter, state, starts, p, variables, aliases) for p in places]
    found, seen = {}, np.zeros(total, int)
    for path in digits[0]:
        parts = [digit[path] for digit in digits]
        numbers = sum(p * part for p, part in zip(places, parts, strict=True))
        numbers = np.rint(numbers).astype(int).reshape(-1)
        if not _whole(*parts) or numbers.max(initial=0) >= total:
            raise InputError(f"the converter computes with the numbers that go to {path}")
        np.add.at(seen, numbers, 1)
        _add_pieces(found, path, numbers, state, starts)
    _check_bijection(seen, state, starts, needed)
    return found


def _converted(array) -> bool:
    return array.dtype.kind == "f"


def _through(converter, state, starts, place: int, variables, aliases) -> dict[str, np.ndarray]:
    """The digit of a power of BASE of every element's number, after the converter, by path."""
    given = {}
    for name, array in state.items():
        numbers = (np.arange(array.size) + starts[name]).reshape(array.shape)
        part = np.asarray(numbers // place % BASE, np.float32)
        given[name] = torch.from_numpy(part if _converted(array) else array)
    given |= {alias: given[name] for alias, name in aliases.items()}
    try:
        result = converter(given)
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"the converter raises {type(error).__name__}: {error}") from error
    leaves = _floats(result)
    wanted = _floats(variables)
    if {p: a.shape for p, a in leaves.items()} != {p: a.shape for p, a in wanted.items()}:
        odd = sorted(set(leaves) ^ set(wanted)) or [
            p for p in leaves if leaves[p].shape != wanted[p].shape
        ]
        raise InputError(f"the converter returns other leaves than the network has: {listed(odd)}")
    return leaves


def _floats(tree) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in found}
    for path, leaf in arrays.items():
        if not isinstance(leaf, np.ndarray | np.generic | jax.Array | float | int):
            raise InputError(f"the converter returns a {type(leaf).__name__} for {path}, no array")
    return {
        p: np.asarray(a, np.float64)
        for p, a in arrays.items()
        if jax.numpy.issubdtype(jax.numpy.result_type(a), jax.numpy.floating)
    }


def _whole(*digits) -> bool:
    return all((digit == np.rint(digit)).all() and (digit >= 0).all() for digit in digits)


def _add_pieces(found, path, numbers, state, starts):
    for name, start in starts.items():
        size = state[name].size if _converted(state[name]) else 0
        inside = np.flatnonzero((numbers >= start) & (numbers < start + size))
        if len(inside):
            found.setdefault(name, []).append(Piece(path, inside, numbers[inside] - start))


def _check_bijection(seen, state, starts, needed: set[str]):
    lost, doubled = [], []
    for name, start in starts.items():
        count = seen[start : start + state[name].size] if _converted(state[name]) else np.ones(1)
        lost += [name] if name in needed and (count == 0).any() else []
        doubled += [name] if (count > 1).any() else []
    if lost or doubled:
        what = [f"elements of {listed(lost)} go nowhere"] if lost else []
        what += [f"elements of {listed(doubled)} go to two places"] if doubled else []
        raise InputError(f"the converter is no bijection: {'; '.join(what)}")


def differences(given: dict[str, list[Piece]], found: Mapping) -> dict[str, str]:
    """{tensor: sentence} of what the converter puts elsewhere than the structure does."""
    return {
        name: f"the converter puts {name} into {_difference(given[name], found.pieces[name])}"
        for name in given
        if name in found.pieces and _elements(given[name]) != _elements(found.pieces[name])
    }


def _difference(given: list[Piece], found: list[Piece]) -> str:
    here, there = _places(given), _places(found)
    if here == there:
        return f"{here} in another order than the network's structure"
    return f"{here}; in the network's structure it belongs into {there}"


def _places(parts: list[Piece]) -> str:
    return listed(sorted({piece.leaf for piece in parts}))


def _elements(parts: list[Piece]) -> list[tuple]:
    ordered = []
    for piece in sorted(parts, key=lambda p: p.leaf):
        order = np.argsort(piece.theirs)
        ordered.append((piece.leaf, piece.ours[order].tobytes(), piece.theirs[order].tobytes()))
    return ordered
