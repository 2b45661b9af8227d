"""Another normalisation of the images than PyTorch's, by a mean and a deviation of each channel."""

from typing import NamedTuple

import numpy as np
import torch

from equivalence_tests.parity.causes.evidence import SAME
from equivalence_tests.parity.ports.graph import Graph, Value
from equivalence_tests.parity.ports.variant import Variant
from equivalence_tests.parity.ports.walk import Step, Walk

NORMALISED = "the input is normalised by "


class _Affine(NamedTuple):
    """A value that is computed from the images by a factor and a shift of each channel."""

    factor: np.ndarray

    shift: np.ndarray

    def __str__(self) -> str:
        return f"mean {_listed(-self.shift / self.factor)} and std {_listed(1 / self.factor)}"

    def same(self, other: "_Affine") -> bool:
        return np.allclose(np.array(self), np.array(other), 1e-7, 1e-9)


def _listed(values: np.ndarray) -> str:
    texts = [f"{round(value, 9) + 0.0:.4g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


def normalisations(walk: Walk, step: Step) -> dict[int, list[Variant]]:
    """{operation of PyTorch: the variant with which it sees the images as JAX normalises them}."""
    readers = [i for i in step.operations
               if walk.standard.images in walk.standard.operations[i].inputs]  # fmt: skip
    if not readers:
        return {}
    images = walk.of_torch[walk.standard.images].numpy()
    ours = _last(walk.subject, step.subject, walk.of_jax, images, (0, 3, 1, 2))
    known = dict(walk.of_torch)
    with torch.no_grad():
        walk.standard.evaluate(known, step.operations)
    theirs = _last(walk.standard, step.standard, known, images, (0, 1, 2, 3))
    if not ours or not theirs or ours[1].same(theirs[1]):
        return {}
    value, own = theirs
    index = walk.standard.producers().get(value)
    factor = ours[1].factor / own.factor
    shift = ours[1].shift - own.shift * factor
    to_jax = _by_channel(factor, shift)
    run = walk.standard.operations[readers[0] if index is None else index].run
    before = lambda x, *rest: run(to_jax(x), *rest)  # noqa: E731
    after = lambda *arrays: (to_jax(run(*arrays)[0]),)  # noqa: E731
    reason = f"{NORMALISED}{ours[1]} instead of {own}"
    if index is None:
        return {readers[0]: [Variant(reason, before)]}
    return {index: [Variant(reason, after)]}


def _by_channel(factor, shift):
    factor, shift = (torch.from_numpy(a).reshape(-1, 1, 1) for a in (factor, shift))
    return lambda x: x * factor + shift


def _last(graph: Graph, target: Value, known: dict, images, axes) -> tuple[Value, _Affine] | None:
    """The last value on the way to a target that normalises the images; None if there is none."""
    found = None
    operations = [graph.operations[i] for i in graph.needed([target])]
    for value in [graph.images, *(v for operation in operations for v in operation.outputs)]:
        array = known.get(value)
        for order in (axes, (0, 1, 2, 3)) if np.ndim(array) == 4 else ():
            turned = np.asarray(array).transpose(order)
            fitted = _fitted(images, turned) if turned.shape == images.shape else None
            found = found if fitted is None else (value, fitted)
    return found


def _fitted(images, array) -> _Affine | None:
    axes = (0, 2, 3)
    mean, middle = (a.mean(axes, keepdims=True) for a in (images, array))
    away = images - mean
    factor = ((array - middle) * away).sum(axes) / np.square(away).sum(axes)
    if not factor.all():
        return None
    shift = middle.ravel() - factor * mean.ravel()
    fitted = images * factor.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)
    near = np.linalg.norm(array - fitted) <= SAME * np.linalg.norm(array)
    return _Affine(factor, shift) if near else None
