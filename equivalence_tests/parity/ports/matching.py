"""Finds without names which element of which JAX leaf is which element of which PyTorch tensor.

Kernels are matched by their shapes and their places in the graph. Vectors are matched within the
group that stands below the same kernels: every assignment is tried, and the one with which JAX
computes most nearly what PyTorch computes is taken.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from equivalence_tests.parity.ports import kernel_orders, layers
from equivalence_tests.parity.ports.layers import Layer
from equivalence_tests.parity.ports.layouts import LARGEST, closest
from equivalence_tests.parity.ports.mapping import Mapping, Piece, filled, piece_of
from equivalence_tests.parity.ports.walk import Walk
from equivalence_tests.parity.tolerances import relative_error

RADII = (1000, 8, 4, 2, 1, 0)
MOST_TIED = 4
"""Kernels at equal places, all of whose orders are tried."""

CLEAR = 0.5
"""An assignment is taken without a word if its error is below this share of the next one's."""

MOST_TRIALS = 5000


class Tie(NamedTuple):
    """Kernels that stand at equal places, so that their order is a guess."""

    radius: int

    standard: list[int]

    subject: list[int]


class Stage(NamedTuple):
    """Layers that stand at the same place on both sides: one kernel, or a group of vectors."""

    standard: list[Layer]

    subject: list[Layer]

    kernel: bool


def stages(standard: list[Layer], subject: list[Layer], pairs: dict[int, int]) -> list[Stage]:
    """All stages in the order in which PyTorch computes them.

    Args:
      pairs: {index of a kernel of PyTorch: of a kernel of JAX}.
    """
    pairs = {layers.IMAGE: layers.IMAGE} | pairs
    found = [
        Stage([layer], [subject[pairs[i]]] if i in pairs else [], kernel=True)
        for i, layer in enumerate(standard)
        if layer.kernel
    ]
    theirs, ours = _vectors(standard), _vectors(subject)
    for above, group in theirs.items():
        place = frozenset(pairs.get(i) for i in above)
        found.append(Stage(group, ours.get(place, []), kernel=False))
    # A group depends on the kernels above it only, and kernels below may need its first vectors.
    return sorted(found, key=lambda stage: stage.standard[0].operation)


def _vectors(found: list[Layer]) -> dict[frozenset, list[Layer]]:
    groups = {}
    for layer in found:
        if not layer.kernel:
            groups.setdefault(layer.above, []).append(layer)
    return groups


def match(
    walk: Walk,
    standard: list[Layer],
    subject: list[Layer],
    statistics: tuple,
    given: dict[str, list[Piece]],
    pairs: dict[int, int],
) -> Mapping:
    """Finds the mapping on one walk in evaluation mode, and fills the walk's leaves by it.

    Args:
      walk: at its beginning.
      statistics: (names of PyTorch's statistics, paths of the JAX leaves that training changes).
      given: pieces that are settled already.
      pairs: {kernel of PyTorch: kernel of JAX}, of `paired_kernels`.
    """
    _fill(walk, given)
    mapping = Mapping({n: list(p) for n, p in given.items()}, {}, {}, [], {})
    tied = _tied(standard) - set(given)
    found = stages(standard, subject, pairs)
    for stage, after in itertools.zip_longest(found, found[1:]):
        pieces = (
            _kernel(walk, stage, mapping, tied)
            if stage.kernel
            else _group(walk, stage, mapping, statistics, tied)
        )
        for name, parts in pieces.items():
            mapping.pieces.setdefault(name, []).extend(parts)
        _fill(walk, pieces)
        if after is None or after.standard[0].operation != stage.standard[0].operation:
            anchor(walk, stage, mapping)  # else the kernel has factors that are not yet placed
    walk.anchor(walk.standard.logits, walk.subject.logits)
    _list_the_rest(walk, mapping, standard, subject)
    return mapping


def _tied(found: list[Layer]) -> set[str]:
    """Names of the parameters that several layers use."""
    names = [name for layer in found for name in layer.parameters]
    return {name for name in names if names.count(name) > 1}


def _list_the_rest(walk: Walk, mapping: Mapping, standard: list[Layer], subject: list[Layer]):
    """Lists every tensor and every leaf that is not wholly matched, as far as layers use it."""
    theirs, ours = _used(standard), _used(subject)
    placed = {leaf: [] for leaf in walk.leaves}
    for piece in mapping.parts():
        placed[piece.leaf].append(piece.ours)
    for leaf, array in walk.leaves.items():
        wide = getattr(array, "dtype", None) == np.float64
        if wide and not _covered(ours.get(leaf), placed[leaf]):
            mapping.extra[leaf] = np.shape(array)
    for name, array in walk.state.items():
        parts = [piece.theirs for piece in mapping.pieces.get(name, ())]
        if array.dtype.kind == "f" and not _covered(theirs.get(name), parts):
            mapping.unplaced[name] = np.shape(array)


def _used(found: list[Layer]) -> dict[str, list[np.ndarray]]:
    """{parameter: numbers of its elements that layers use}, as far as these are known."""
    used = {}
    for layer in found:
        for name, numbers in layer.parameters.items():
            if numbers is not None:
                used.setdefault(name, []).append(numbers[numbers >= 0].reshape(-1))
    return used


def _covered(used, placed) -> bool:
    if not placed:
        return False
    return used is None or bool(np.isin(np.concatenate(used), np.concatenate(placed)).all())


def _fill(walk: Walk, pieces: dict[str, list[Piece]]):
    walk.leaves.update(filled(walk, pieces))


def anchor(walk: Walk, stage: Stage, mapping: Mapping):
    """Compares the outputs of the last layers of a stage that have a parameter in common.

    In training PyTorch's BatchNorm reads its running statistics and JAX's may not.
    """
    theirs = [{p.leaf for n in layer.parameters for p in mapping.pieces.get(n, ())}
              for layer in stage.standard]  # fmt: skip
    ours = [set(layer.parameters) for layer in stage.subject]
    common = set().union(*theirs) & set().union(*ours)
    sides = zip((stage.standard, stage.subject), (theirs, ours), strict=True)
    if common:
        walk.anchor(*([layer.output for layer, held in zip(side, leaves, strict=True)
                       if held & common][-1] for side, leaves in sides))  # fmt: skip


def tied(standard: list[Layer], ties: list[Tie]) -> list[str]:
    """Kernels that were paired by their shapes and their order only, one sentence a set."""
    return [
        f"{', '.join(n for i in tie.standard for n in standard[i].parameters)}: matched by shape"
        " and order only"
        for tie in ties
        if tie.radius == 0
    ]


def orders(pairs: dict[int, int], tie: Tie) -> Iterator[dict[int, int]]:
    """The other ways to pair the kernels of a tie."""
    if len(tie.standard) == len(tie.subject) <= MOST_TIED:
        for order in itertools.islice(itertools.permutations(tie.subject), 1, None):
            yield pairs | dict(zip(tie.standard, order, strict=True))


def fused(standard: list[Layer], subject: list[Layer]) -> dict[str, int]:
    """{dense kernel of the first side: number of kernels that the second has in its place}."""
    pairs, _ = paired_kernels(standard, subject)
    left = [layer for i, layer in enumerate(subject) if layer.kernel and i not in pairs.values()]
    found = {}
    for index, layer in enumerate(standard):
        if (
            layer.kernel
            and index not in pairs
            and (shape := layers.shape(layer))
            and len(shape) == 2
        ):
            places = [layers.shape(other) for other in left]
            for parts in (3, 2):
                if places.count((shape[0] // parts, shape[1])) >= parts:
                    found |= dict.fromkeys(layer.parameters, parts)
                    break
    return found


def _kernel(walk: Walk, stage: Stage, mapping: Mapping, tied: set) -> dict[str, list[Piece]]:
    if not stage.subject:
        return {}
    found = kernel_orders.placed(walk, stage.standard[0], stage.subject[0])
    found = {n: p for n, p in found.items() if n in tied or not mapping.has(n, p[0].theirs)}
    held = {n: p[0].leaf for n, p in found.items() if mapping.holds(p[0].leaf, p[0].ours)}
    mapping.shared.update({n: leaf for n, leaf in held.items() if n not in mapping.pieces})
    return {n: p for n, p in found.items() if n not in held}


def _group(
    walk: Walk, stage: Stage, mapping: Mapping, statistics, tied: set
) -> dict[str, list[Piece]]:
    """The assignment of the vectors of one group with which JAX is nearest to PyTorch."""
    theirs = _parameters(stage.standard, lambda n, a: n not in tied and mapping.has(n, a))
    ours = _parameters(stage.subject, mapping.holds)
    if not theirs or not ours:
        return {}
    expected = walk.in_torch(stage.standard[-1].output)
    trials = []
    for pieces in itertools.islice(assignments(theirs, ours, statistics), MOST_TRIALS):
        got = walk.in_jax(stage.subject[-1].output, filled(walk, pieces))
        trials.append((closest(expected, got)[0], pieces))
    trials.sort(key=lambda trial: trial[0])
    if not trials or (trials[0][0] >= LARGEST and len(trials) > 1):
        return {}
    if len(trials) > 1 and trials[0][0] > CLEAR * trials[1][0]:
        mapping.ambiguous.append(
            f"{', '.join(theirs)}: two assignments to {', '.join(ours)} fit alike"
            f" ({trials[0][0]:.1e} and {trials[1][0]:.1e})"
        )
    return trials[0][1]


def _parameters(group: list[Layer], placed) -> dict[str, np.ndarray]:
    return {
        name: order
        for layer in group
        for name, order in layer.parameters.items()
        if order is not None and not placed(name, order)
    }


def assignments(theirs: dict, ours: dict, statistics) -> Iterator[dict[str, list[Piece]]]:
    """All ways to give the tensors of a group to its leaves, one leaf each, sizes permitting.

    A statistic goes to a leaf that training changes, where there are enough of these.
    """
    names = list(theirs)
    buffers, changed = (set(part) for part in statistics)
    counts = sum(n in buffers for n in theirs), sum(n in changed for n in ours)
    heeded = counts[1] <= counts[0] and len(ours) - counts[1] <= len(theirs) - counts[0]
    options = [
        [
            [piece_of(leaf, ours[leaf].reshape(-1), left)]
            for leaf in ours
            if not heeded or (name in buffers) == (leaf in changed)
            for left in _orders(theirs[name], ours[leaf])
        ]
        or [None]
        for name in names
    ]
    if len(theirs) > len(ours):
        options = [choices if None in choices else [*choices, None] for choices in options]
    for choice in itertools.product(*options):
        taken = [pieces[0].leaf for pieces in choice if pieces]
        if taken and len(set(taken)) == len(taken):
            yield {n: pieces for n, pieces in zip(names, choice, strict=True) if pieces}


def _orders(theirs: np.ndarray, ours: np.ndarray) -> list[np.ndarray]:
    """Orders of a tensor's elements in which they may stand in a leaf."""
    if theirs.size != ours.size:
        return []
    found = [
        theirs.transpose(axes).reshape(-1)
        for axes in itertools.permutations(range(theirs.ndim))
        if theirs.transpose(axes).shape == ours.shape
    ]
    return found or [theirs.reshape(-1)]


def paired_kernels(standard: list[Layer], subject: list[Layer]) -> tuple[dict[int, int], list[Tie]]:
    """{kernel of PyTorch: kernel of JAX}, and the sets of kernels that stand at equal places."""
    pairs, ties = _paired(standard, subject, frozenset())
    matrices = _matrices(standard, subject, pairs)
    return _paired(standard, subject, matrices) if matrices else (pairs, ties)


def _matrices(standard: list[Layer], subject: list[Layer], pairs) -> frozenset:
    """Shapes of convolutions without a partner in whose place the other side has a matrix.

    Patches may be cut out of an image and multiplied by a matrix, for example.
    """
    sides = (standard, pairs), (subject, pairs.values())
    theirs, ours = (
        {layers.shape(layer) for i, layer in enumerate(found) if layer.kernel and i not in taken}
        for found, taken in sides
    )
    return frozenset(
        shape
        for own, other in ((theirs, ours), (ours, theirs))
        for shape in own
        if len(shape) == 4 and layers.matrix(shape) in other
    )


def _paired(standard, subject, matrices) -> tuple[dict[int, int], list[Tie]]:
    pairs, ties = {}, []
    for radius in RADII:
        theirs = _by_colour(standard, radius, pairs, matrices)
        ours = _by_colour(subject, radius, pairs.values(), matrices)
        for colour, left in theirs.items():
            right = ours.get(colour, [])
            if len(left) == len(right) or (radius == 0 and right):
                pairs |= dict(zip(left, right, strict=False))
                if len(left) > 1 or len(right) > 1:
                    ties.append(Tie(radius, left, right))
    return pairs, ties


def _by_colour(found: list[Layer], radius: int, taken, matrices) -> dict[int, list[int]]:
    groups, taken = {}, set(taken)
    for index, colour in layers.colours(found, min(radius, len(found)), matrices).items():
        if index not in taken:
            groups.setdefault(colour, []).append(index)
    return groups


def mapped(standard: list[Layer], subject: list[Layer], mapping: Mapping) -> dict[int, int]:
    """{kernel of PyTorch: kernel of JAX} in other graphs of the same networks, by the mapping."""
    ours = {}
    for index, layer in enumerate(subject):
        for leaf in layer.parameters if layer.kernel else ():
            ours.setdefault(leaf, []).append(index)
    pairs = {}
    for index, layer in enumerate(standard):
        pieces = [
            piece
            for name, numbers in (layer.parameters.items() if layer.kernel else ())
            for piece in mapping.pieces.get(name, ())
            if np.isin(piece.theirs, numbers).any()
        ]
        left = [i for p in pieces for i in ours.get(p.leaf, ()) if i not in pairs.values()]
        pairs |= {index: left[0]} if left else {}
    return pairs


def place_statistics(walk: Walk, mapping: Mapping, buffers: list[str], changed: list[str]):
    """Places running statistics that JAX's network does not read in evaluation.

    A leaf is a tensor's place if training moves it most nearly as PyTorch moves the tensor.

    Args:
      walk: in training mode, at its end.
    """
    used = {piece.leaf for pieces in mapping.pieces.values() for piece in pieces}
    wanted = walk.standard.needed(walk.standard.after.values(), walk.of_torch)
    values = walk.standard.evaluate(dict(walk.of_torch), wanted)
    for name in [n for n in mapping.unplaced if n in buffers and n in walk.standard.after]:
        expected = values[walk.standard.after[name]].numpy()
        trials = []
        for leaf in [p for p in changed if p not in used]:
            if np.size(walk.leaves[leaf]) == expected.size:
                tried = walk.leaves | {leaf: walk.state[name].reshape(np.shape(walk.leaves[leaf]))}
                got = np.asarray(walk.in_jax(walk.subject.after[leaf], tried)).reshape(-1)
                trials.append((relative_error(got, expected.reshape(-1)), leaf))
        error, leaf = min(trials, default=(LARGEST, None))
        if error < CLEAR:
            numbers = np.arange(expected.size)
            mapping.pieces[name] = [Piece(leaf, numbers, numbers)]
            walk.leaves[leaf] = walk.state[name].reshape(np.shape(walk.leaves[leaf])).copy()
            used.add(leaf)
            mapping.extra.pop(leaf, None)
            mapping.unplaced.pop(name)
