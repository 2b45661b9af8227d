"""Dropout with the same masks in both networks.

In both graphs a draw is an operation that gives numbers from 0 to 1, of which a mask is computed.
PyTorch's draws take the numbers of JAX's draws at the same place.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports.graph import Graph, Operation, Value
from equivalence_tests.parity.ports.layouts import layouts
from equivalence_tests.parity.ports.variant import Variant
from flax_resnet.text import listed

DRAW = "draw"
"""Name of an operation that draws numbers of the option `shape`."""

KEEP = "dropout"
"""Name of PyTorch's operation that makes a mask of 0 and 1 of a draw. What follows divides the mask
by the option `share`, the share of the values that is kept."""

MOST_EXTRA = 3
"""Dropouts of JAX alone that are tried as the cause of a later difference."""

MOST_WAYS = 100
"""Ways to pair the draws of one place that are tried."""

MOST_LAYOUTS = 4
"""Layouts of such a dropout that are tried."""

_STEPS = 50


def numbers(*seed: int, shape) -> np.ndarray:
    """The same numbers whenever a draw is computed."""
    return np.random.default_rng(seed).random(tuple(shape))


class Drawn(NamedTuple):
    """A draw, and the mask that is computed from it."""

    numbers: np.ndarray
    """A value is kept where its number is below `share`."""

    share: float | None
    """The share of the values that is kept; None if the draw makes no mask."""

    below: bool = True
    """False if the graph keeps values where the numbers that it draws are above a threshold."""

    @property
    def ways(self) -> tuple["Drawn", ...]:
        """The mask, and its reverse: a network may select the values that it drops."""
        if self.share is None:
            return (self,)
        return self, Drawn(1 - self.numbers, 1 - self.share, not self.below)

    def like(self, shape) -> list[np.ndarray]:
        """The numbers in every layout that fits a mask of PyTorch."""
        if self.numbers.size != np.prod(shape):
            return []
        ways = layouts(tuple(shape), self.numbers.shape)
        return [way.to_torch(self.numbers).numpy() for way in ways]

    def beside(self, shape) -> list[np.ndarray]:
        """The numbers in layouts of a mask in which other values share a number."""
        rank = self.numbers.ndim
        if rank != len(shape):
            return []
        orders = dict.fromkeys([(0, rank - 1, *range(1, rank - 1)), tuple(range(rank))])
        found = [self.numbers.transpose(axes) for axes in orders]
        return [a for a in found if _broadcast_together(a.shape, shape)]

    def factor(self, array: np.ndarray) -> torch.Tensor:
        """The mask, divided by the share that is kept, for the numbers in some layout."""
        return torch.from_numpy((array < self.share) / self.share)

    @property
    def rate(self) -> str:
        return f"{1 - self.share:.4g}"


def _broadcast_together(one, other) -> bool:
    return all(1 in (m, n) or m == n for m, n in zip(one, other, strict=True))


def drawn(graph: Graph, index: int) -> Drawn:
    """Finds the mask that a graph computes from a draw and constants alone."""
    own, source = graph.operations[index].run()[0], graph.operations[index].outputs[0]
    array = np.asarray(own, np.float64)
    for target in _from_constants(graph, index):
        steps = graph.needed([target], [source])

        def value(number, target=target, steps=steps) -> float:
            found = graph.evaluate({source: 0 * own + number}, steps)[target]
            return float(np.asarray(found).flat[0])

        first, middle, last = (value(number) for number in (0.0, 0.5, 1 - 1e-12))
        if middle in (first, last) and (first == 0) != (last == 0):
            at = _threshold(lambda number, f=value, same=first: f(number) == same)
            mask = Drawn(array, at)
            return mask if last == 0 else mask.ways[1]
    return Drawn(array, None)


def _from_constants(graph: Graph, index: int) -> list[Value]:
    """Values that are computed from a draw and constants alone."""
    source = graph.operations[index].outputs[0]
    constants, found = set(graph.constants), [source]
    for operation in graph.operations:
        if operation.inputs and constants.union(found).issuperset(operation.inputs):
            if constants.issuperset(operation.inputs):
                constants.update(operation.outputs)
            else:
                found.extend(operation.outputs)
    return found[1:]


def _threshold(holds: Callable[[float], bool]) -> float:
    """The number up to which a condition holds."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return round(high, 12)


Shared = tuple[Drawn, np.ndarray]
"""A draw of JAX, and its numbers in the layout of a mask of PyTorch."""


class Place(NamedTuple):
    """The draws between two anchors."""

    dropouts: list[Drawn]
    """JAX's, and earlier ones that PyTorch has not."""

    apart: str
    """Shapes of the draws that only one of the networks has; "" if there are none."""


def _shapes(shapes) -> str:
    return listed(["x".join(map(str, shape)) for shape in shapes]) or "none"


class Draws:
    """The draws of two graphs, of which PyTorch's take JAX's numbers one after the other."""

    def __init__(self, standard: Graph, subject: Graph):
        self.standard, self.subject = standard, subject
        self.of_jax: dict[int, Drawn] = {}
        self._below: dict[int, bool] = {}
        self._settled: set[int] = set()
        self._taken: set[int] = set()
        self._extra: list[Drawn] = []

    def share(self, theirs: list[int], ours: list[int], error: Callable[[], float]) -> Place:
        """Gives PyTorch's draws the numbers with which PyTorch is nearest to JAX.

        Args:
          theirs, ours: operations of PyTorch and of JAX between two anchors.
          error: PyTorch's relative error at the anchor, with the draws as they are.

        Returns:
          What was drawn between the anchors.
        """
        theirs = [i for i in _draws(self.standard, theirs) if i not in self._settled]
        self._below |= {i: drawn(self.standard, i).below for i in theirs}
        ours = [j for j in _draws(self.subject, ours) if j not in self._taken]
        self.of_jax |= {i: drawn(self.subject, i) for i in ours}
        ways, errors = list(itertools.islice(self._ways(theirs, ours), MOST_WAYS)), []
        for way in ways if len(ways) > 1 else ():
            self._put(way)
            errors.append(error())
            if errors[-1] <= tolerances.PORT:
                break
        best = ways[errors.index(min(errors))] if errors else ways[0]
        self._put(best)
        self._settled.update(best)
        self._offer_again([i for i in theirs if i not in best])
        self._taken.update(j for j, _ in best.values())
        alone = [self.of_jax[j] for j in ours if j not in {j for j, _ in best.values()}]
        found = [self.of_jax[j] for j in ours] + self._extra[-MOST_EXTRA:]
        self._extra += alone
        shapes = [self.standard.operations[i].options["shape"] for i in theirs if i not in best]
        apart = _shapes(shapes), _shapes(one.numbers.shape for one in alone)
        sentence = f"PyTorch's {apart[0]}, JAX's {apart[1]}" if shapes or alone else ""
        return Place([way for one in found if one.share for way in one.ways], sentence)

    def _ways(self, theirs, ours) -> Iterator[dict[int, tuple[int, list[Shared]]]]:
        """{PyTorch's draw: (JAX's draw, the masks that may be PyTorch's)}."""
        if not theirs:
            yield {}
            return
        shape = self.standard.operations[theirs[0]].options["shape"]
        pairs = [(j, [(one, a)]) for j in ours for one in self.of_jax[j].ways
                 for a in one.like(shape)]  # fmt: skip
        others = [(j, [(one, a) for one in self.of_jax[j].ways for a in one.beside(shape)])
                  for j in ours]  # fmt: skip
        pairs = pairs or [(j, masks) for j, masks in others if masks]
        for pair in pairs:
            for rest in self._ways(theirs[1:], [j for j in ours if j != pair[0]]):
                yield {theirs[0]: pair} | rest
        if not pairs:
            yield from self._ways(theirs[1:], ours)

    def _offer_again(self, theirs):
        """Offers the masks of earlier dropouts to draws for which JAX draws nothing."""
        for index in theirs:
            shape = self.standard.operations[index].options["shape"]
            earlier = [(one, a) for j in self._taken for one in self.of_jax[j].ways
                       for a in one.like(shape)]  # fmt: skip
            self._set_masks(self.standard.operations[index], again=earlier)

    def _set_masks(self, draw: Operation, **masks):
        for i, other in enumerate(self.standard.operations):
            if other.name == KEEP and other.inputs == draw.outputs:
                self.standard.operations[i] = other._replace(options=other.options | masks)

    def _put(self, way):
        operations = self.standard.operations
        for index, (_, masks) in way.items():
            draw, (_, array) = operations[index], masks[0]
            if array.shape == tuple(draw.options["shape"]):
                array = array if self._below[index] else 1 - array
                run = functools.partial(_constant, torch.from_numpy(array))
                operations[index] = draw._replace(run=run)
            self._set_masks(draw, masks=masks)


def _constant(array, *_) -> tuple:
    return (array,)


def _draws(graph: Graph, indices) -> list[int]:
    return [i for i in indices if graph.operations[i].name == DRAW]


AGAIN = "JAX draws from the key of an earlier dropout, so both drop the same places"


def dropouts(operation: Operation) -> Iterator[Variant]:
    """A dropout that JAX has not, or with another rate, mask or scale."""
    share, shape = operation.options["share"], operation.options["shape"]
    yield Variant("there is no dropout here", lambda draw: (0 * draw + share,))
    for one, array in operation.options.get("again", ()):
        if one.share is not None:
            mask = one.factor(array) * share
            yield Variant(AGAIN, functools.partial(_constant, mask))
    for one, array in operation.options.get("masks", ()):
        if one.share is None:
            continue
        other = [_kinds(array.shape, shape)]
        if abs(one.share - share) > 1e-6:
            other.append(f"the dropout rate is {one.rate} instead of {1 - share:.4g}")
        mask = torch.from_numpy((array < one.share).astype(np.float64))
        for scale in 1 / one.share, 1.0:
            plain = ["dropout does not divide by the share of the values that it keeps"]
            why = " and ".join(filter(None, [*other, *(plain if scale == 1 else [])]))
            if why:
                yield Variant(why, functools.partial(_constant, mask * scale * share))


def _kinds(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """A sentence on what JAX drops instead of what PyTorch drops; "" if it is the same."""
    if tuple(got) == tuple(expected):
        return ""
    whole = [max(pair) for pair in zip(got, expected, strict=True)]
    what, instead = (_kind(shape, whole) for shape in (got, expected))
    return f"dropout drops {what} instead of {instead}"


def _kind(shape, whole) -> str:
    """The name of what a mask of some shape drops of values of the shape `whole`."""
    shared = [axis for axis, (m, n) in enumerate(zip(shape, whole, strict=True)) if m < n]
    names = {(): "elements", (2, 3): "whole channels", (1, 2, 3): "whole images"}
    if len(whole) == 3:
        names |= {(1,): "whole channels", (1, 2): "whole images"}
    axes = " and ".join(map(str, shared))
    return names.get(tuple(shared), f"all values along the axes {axes} together")


EXTRA = "JAX drops values of the input at a rate of"


def extra(operation: Operation, found: list[Drawn]) -> Iterator[Variant]:
    """A dropout in JAX of which PyTorch's operation knows nothing."""
    if operation.name in (DRAW, KEEP) or not operation.inputs:
        return
    positions = range(len(operation.inputs) if operation.name == "add" else 1)
    for one, position, layout in itertools.product(found, positions, range(MOST_LAYOUTS)):
        run = functools.partial(_dropping, operation.run, one, position, layout)
        yield Variant(f"{EXTRA} {one.rate}, PyTorch does not", run)


def _dropping(run, one: Drawn, position: int, layout: int, *arrays):
    x = arrays[position]
    fitting = one.like(x.shape) or one.beside(x.shape)
    if layout >= len(fitting):
        raise ValueError(f"a mask of {one.numbers.shape} does not fit {tuple(x.shape)}")
    dropped = x * one.factor(fitting[layout])
    return run(*(dropped if i == position else a for i, a in enumerate(arrays)))
