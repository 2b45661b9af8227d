"""The layers of a graph: operations in which parameters meet data.

A layer is found by what it does. A kernel is multiplied and summed (a convolution, a matrix
product); every other parameter or statistic is a vector. On the way to its layer a parameter may be
transposed, reshaped, cut or joined, so each layer says which element of which leaf stands where.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from equivalence_tests.parity.ports.graph import Graph, Value

IMAGE = -1
"""Stands for the images among the kernels above a layer."""

MOVES = {
    # JAX
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims", "slice", "concatenate",
    "rev", "gather", "index", "stack", "copy", "split", "dynamic_slice",
    # PyTorch
    "permute", "view", "t", "unsqueeze", "expand", "select", "chunk", "cat", "clone",
    "flip", "contiguous", "_unsafe_view", "alias", "detach", "unflatten", "getitem",
}  # fmt: skip
"""Operations that only move elements; run on numbers of elements they tell where each went."""

PRODUCTS = {
    "conv_general_dilated", "dot_general", "conv1d", "conv2d", "conv_transpose2d", "linear",
    "matmul", "mm", "einsum",
}  # fmt: skip


SPREADS = {"broadcast_in_dim", "reshape", "convert_element_type"}
"""Operations that give a vector of data the shape of an image."""


class Layer(NamedTuple):
    """An operation that takes data and parameters."""

    operation: int
    """Its index in the graph."""

    kernel: bool

    parameters: dict[str, np.ndarray]
    """{leaf: number of the leaf's element at each position}. A kernel's positions are
    `[out, in, height, width]` or `[out, in]`, a vector's have no axis along which it repeats."""

    output: Value

    above: frozenset[int]
    """Indices in the list of layers of the kernels nearest above, through any other operations;
    IMAGE for the images."""


def layers_of(graph: Graph, leaves: dict[str, np.ndarray]) -> list[Layer]:
    """The layers on the way to the logits, in the order of computation.

    Args:
      leaves: arrays of the graph's leaves; only their shapes matter.
    """
    analysis = _Analysis(graph, leaves)
    return [layer if layer.kernel else analysis.applied(layer) for layer in analysis.found]


class _Analysis:
    def __init__(self, graph: Graph, leaves):
        self.graph, self.found = graph, []
        self.above = {graph.images: frozenset([IMAGE])}
        self.arrays = {value: leaves[name] for name, value in graph.leaves.items()}
        self.numbers = {
            value: {name: _numbers(np.shape(leaves[name]))}
            for name, value in graph.leaves.items()
            if _is_float(leaves[name])  # indices are no parameters
        }
        self.uses = {}
        for index in graph.needed([graph.logits]):
            self._visit(index)
            for value in graph.operations[index].inputs:
                self.uses.setdefault(value, []).append(graph.operations[index])

    def applied(self, layer: Layer) -> Layer:
        """The layer with its whole result as its output, where it scales a part of its data.

        Flax multiplies the inverse deviation by the scale first and the deviations by both; a
        PReLU scales the negative half.
        """
        while (product := self._product(layer.output, layer.output)) is not None:
            layer = layer._replace(output=product)
        return layer

    def _product(self, value: Value, origin: Value) -> Value | None:
        for operation in self.uses.get(value, ()):
            if operation.name in SPREADS:
                return self._product(operation.outputs[0], origin)
            others = [v for v in operation.inputs if v != value and v in self.above]
            beside = all(self.above[v] == self.above[value] for v in others)
            if operation.name in ("mul", "select_n", "max") and others and beside:
                if not any(self.graph.reads(v, origin) for v in others):
                    return operation.outputs[0]
        return None

    def _visit(self, index):
        operation = self.graph.operations[index]
        data = [v for v in operation.inputs if v in self.above]
        if not data:
            return self._prepare(operation)
        above = frozenset().union(*(self.above[v] for v in data))
        taken = {n: a for v in operation.inputs for n, a in self.numbers.get(v, {}).items()}
        if taken:
            kernel = operation.name in PRODUCTS and all(a is not None for a in taken.values())
            order = (lambda a: trimmed(_kernel(operation, a, data))) if kernel else compact
            parameters = {n: None if a is None else order(a) for n, a in taken.items()}
            factors = _factors(parameters) if kernel else {}
            parameters = {n: a for n, a in parameters.items() if n not in factors}
            self.found.append(Layer(index, kernel, parameters, operation.outputs[0], above))
            above = frozenset([len(self.found) - 1]) if kernel else above
            if factors:
                self.found.append(Layer(index, False, factors, operation.outputs[0], above))
        self.above.update(dict.fromkeys(operation.outputs, above))
        return None

    def _prepare(self, operation):
        """Follows the elements of leaves through an operation without data."""
        inputs = [self._array(v) for v in operation.inputs]
        outputs = operation.run(*inputs)
        self.arrays.update(zip(operation.outputs, outputs, strict=True))
        names = dict.fromkeys(n for v in operation.inputs for n in self.numbers.get(v, {}))
        for position, value in enumerate(operation.outputs):
            followed = {n: self._follow(operation, n, inputs, position, outputs) for n in names}
            if followed:
                self.numbers[value] = followed

    def _array(self, value):
        return self.graph.constants[value] if value in self.graph.constants else self.arrays[value]

    def _follow(self, operation, name, inputs, position, outputs):
        """Numbers of a leaf's elements in an output; None where they are lost."""
        numbers = [self.numbers.get(v, {}).get(name) for v in operation.inputs]
        if operation.name in MOVES:
            moved = [
                _as(a, n if n is not None else _nowhere(a, v in self.numbers))
                for a, n, v in zip(inputs, numbers, operation.inputs, strict=True)
            ]
            return _moved(operation, moved, position)
        shape = np.shape(outputs[position]) if not isinstance(outputs[position], tuple) else ()
        for found in numbers:
            if found is not None and _broadcasts(found.shape, shape):
                return np.broadcast_to(found, shape)
        return None


def _factors(parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Vectors that a kernel was multiplied by on the way to its layer, as a weight normalisation
    does: their elements repeat where another parameter has elements of its own."""
    there = {name: numbers >= 0 for name, numbers in parameters.items()}
    return {
        name: compact(numbers)
        for name, numbers in parameters.items()
        if len(np.unique(numbers[there[name]])) < there[name].sum()
        and any((there[name] & there[other]).any() for other in parameters if other != name)
    }


def _numbers(shape) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape)


def _moved(operation, moved, position):
    if any(a is None for a in moved):
        return None
    found = operation.run(*moved)[position]
    if isinstance(found, tuple | list):
        return _Several(np.asarray(part) for part in found)
    return np.asarray(found)


class _Several(tuple):
    """Numbers of the parts of an operation with several outputs in one value."""

    shape = ()


def _nowhere(array, of_leaf: bool):
    """-1 in place of other leaves' elements; indices of a gather stay as they are."""
    return np.full(np.shape(array), -1) if of_leaf or _is_float(array) else array


def _is_float(array) -> bool:
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return bool(jnp.issubdtype(jnp.result_type(array), jnp.floating))


def _as(like, numbers):
    """Numbers as an array of the framework of `like`."""
    if isinstance(like, tuple | list):
        return tuple(_as(a, n) for a, n in zip(like, numbers, strict=True))
    if isinstance(like, torch.Tensor):
        return torch.as_tensor(np.ascontiguousarray(numbers))
    return jnp.asarray(numbers)


def _broadcasts(shape, target) -> bool:
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _kernel(operation, numbers, data) -> np.ndarray:
    """Numbers of a kernel's elements as [out, in, height, width] or [out, in]."""
    if operation.name == "conv_general_dilated":
        return numbers.transpose(operation.options["dimension_numbers"].rhs_spec)
    if operation.name == "dot_general":
        (left, right), (left_batch, right_batch) = operation.options["dimension_numbers"]
        first = operation.inputs[0] not in data
        return _product(numbers, left if first else right, left_batch if first else right_batch)
    if operation.name in ("matmul", "mm"):
        return numbers.swapaxes(-1, -2) if operation.inputs[0] in data else numbers
    if operation.name == "einsum":
        return _einsum(operation, numbers, data)
    if operation.name == "conv_transpose2d":
        return _transposed(numbers, operation.options["groups"])
    return numbers


def _transposed(numbers, groups) -> np.ndarray:
    """The kernel of the convolution of spread-out pixels that a transposed convolution is."""
    inputs, outputs, *window = numbers.shape
    parts = numbers.reshape(groups, inputs // groups, outputs, *window).swapaxes(1, 2)
    return parts.reshape(groups * outputs, inputs // groups, *window)[..., ::-1, ::-1]


def _product(numbers, contracted, batch):
    free = [a for a in range(numbers.ndim) if a not in (*contracted, *batch)]
    moved = numbers.transpose(*batch, *free, *contracted)
    size = int(np.prod([numbers.shape[a] for a in contracted]))
    return moved.reshape(-1, size)


def _einsum(operation, numbers, data):
    operands, result = operation.options["args"][0].replace(" ", "").split("->")
    first = operation.inputs[0] not in data
    own, other = operands.split(",") if first else reversed(operands.split(","))
    contracted = [own.index(letter) for letter in own if letter in other and letter not in result]
    return _product(numbers, contracted, ())


def trimmed(numbers: np.ndarray) -> np.ndarray:
    """A kernel of one pixel as a matrix."""
    return numbers.reshape(numbers.shape[:2]) if set(numbers.shape[2:]) == {1} else numbers


def compact(numbers: np.ndarray) -> np.ndarray:
    """The numbers without axes along which they repeat."""
    for axis in reversed(range(numbers.ndim)):
        first = numbers.take([0], axis)
        if numbers.shape[axis] == 1 or (numbers == first).all():
            numbers = first.squeeze(axis)
    return numbers


def colours(layers: list[Layer], radius: int, matrices=()) -> dict[int, int]:
    """A colour for each kernel, from its shape and the kernels up to `radius` above and below it.

    Kernels of two graphs with the same colour stand at the same place (Weisfeiler and Leman's
    refinement, `radius` times).

    Args:
      matrices: shapes of four axes that have the colour of a matrix of the same inputs and outputs.
    """
    kernels = [i for i, layer in enumerate(layers) if layer.kernel]
    below = {i: [j for j in kernels if i in layers[j].above] for i in kernels}
    shapes = {i: shape(layers[i]) for i in kernels}
    colour = {i: hash(matrix(s) if s in matrices else s) for i, s in shapes.items()} | {IMAGE: 0}
    for _ in range(radius):
        colour = {IMAGE: 0} | {
            i: hash((colour[i], _sorted(colour, layers[i].above), _sorted(colour, below[i])))
            for i in kernels
        }
    return {i: colour[i] for i in kernels}


def _sorted(colour, neighbours) -> tuple[int, ...]:
    return tuple(sorted(colour[i] for i in neighbours))


def shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a kernel."""
    return next(iter(layer.parameters.values())).shape


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a kernel as a matrix: (outputs, inputs)."""
    return shape[0], int(np.prod(shape[1:]))
