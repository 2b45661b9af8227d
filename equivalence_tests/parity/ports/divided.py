"""Graphs in which one dense layer is computed in equal parts of its outputs, joined afterwards.

Attention may have one kernel for query, key and value on one side, and three on the other.
"""

import functools
import itertools

import jax.numpy as jnp
import torch

from equivalence_tests.parity.ports.graph import Graph, Operation


def in_torch(graph: Graph, weight: str, parts: int) -> Graph:
    """PyTorch's graph with the layer of one weight in parts."""
    free = _free(graph)
    operations = []
    for operation in graph.operations:
        if operation.name == "linear" and graph.leaves[weight] == operation.inputs[1]:
            operations += _in_parts(operation, parts, free)
        elif operation.name == "add_bias" and operation.inputs[0] in _outputs(operations, "cat"):
            joined = operations.pop()
            biased = []
            for part, source in enumerate(joined.inputs):
                piece, output = next(free), next(free)
                bias = operation.inputs[1]
                operations.append(_part(operation, bias, piece, part, parts))
                operations.append(operation._replace(inputs=(source, piece), outputs=(output,)))
                biased.append(output)
            operations.append(joined._replace(inputs=tuple(biased), outputs=operation.outputs))
        else:
            operations.append(operation)
    return graph._replace(operations=operations)


def _in_parts(operation: Operation, parts: int, free) -> list[Operation]:
    found, outputs = [], []
    for part in range(parts):
        kernel, output = next(free), next(free)
        found.append(_part(operation, operation.inputs[1], kernel, part, parts))
        inputs = operation.inputs[0], kernel
        found.append(operation._replace(inputs=inputs, outputs=(output,)))
        outputs.append(output)
    joined = operation._replace(
        name="cat", run=_joined, inputs=tuple(outputs), outputs=operation.outputs, options={}
    )
    return [*found, joined]


def _part(operation, source, output, part, parts) -> Operation:
    def run(array):
        return (array.chunk(parts)[part],)

    return operation._replace(name="chunk", run=run, inputs=(source,), outputs=(output,))


def _joined(*arrays):
    return (torch.cat(arrays, -1),)


def _outputs(operations, name) -> tuple[int, ...]:
    """The outputs of the last operation, if it has this name."""
    return operations[-1].outputs if operations and operations[-1].name == name else ()


def _free(graph: Graph):
    """Numbers that no value of the graph has."""
    return itertools.count(1 + max(v for op in graph.operations for v in (*op.outputs, *op.inputs)))


def in_jax(graph: Graph, leaf: str, parts: int, shape: tuple[int, ...]) -> Graph:
    """JAX's graph with the product of one kernel in parts, and the bias that follows it.

    Args:
      shape: the leaf's.
    """
    free, kernels, joined, operations = _free(graph), {graph.leaves[leaf]}, {}, []
    for operation in graph.operations:
        if operation.name == "convert_element_type" and operation.inputs[0] in kernels:
            kernels.update(operation.outputs)
        if axes := _axes(operation, kernels, parts, shape):
            operations += _product(operation, kernels, axes, parts, joined, free)
        elif operation.name == "add" and _is_bias(graph, operation, joined):
            operations += _bias(operation, joined, free)
        else:
            operations.append(operation)
    return graph._replace(operations=operations)


def _axes(operation: Operation, kernels, parts: int, shape) -> tuple[int, int] | None:
    """The axis along which a kernel is cut, and that of the product; None if there is none."""
    if operation.name != "dot_general" or not kernels & set(operation.inputs):
        return None
    contracted, batch = operation.options["dimension_numbers"]
    last = operation.inputs[1] in kernels
    free = [a for a in range(len(shape)) if a not in (*contracted[last], *batch[last])]
    whole = [a for a in free if shape[a] == parts] or [a for a in free if not shape[a] % parts]
    if batch[last] or not whole:
        return None
    index = free.index(whole[0])
    return whole[0], index - len(free) if last else index


def _product(operation, kernels, axes, parts, joined, free) -> list[Operation]:
    last = operation.inputs[1] in kernels
    cuts, pieces = _cuts(operation.inputs[last], parts, axes[0], free)
    data = operation.inputs[not last]
    inputs = [(data, piece) if last else (piece, data) for piece in pieces]
    return [*cuts, *_together(operation, inputs, axes[1], joined, free)]


def _is_bias(graph: Graph, operation: Operation, joined: dict) -> bool:
    others = [v for v in operation.inputs if v not in joined]
    return len(others) == 1 and not graph.reads_images(others[0])


def _bias(operation: Operation, joined: dict, free) -> list[Operation]:
    last = operation.inputs[1] not in joined
    axis, sources = joined[operation.inputs[not last]]
    cuts, pieces = _cuts(operation.inputs[last], len(sources), axis, free)
    pairs = zip(sources, pieces, strict=True)
    return [*cuts, *_together(operation, list(pairs), axis, joined, free)]


def _cuts(value, parts: int, axis: int, free) -> tuple[list[Operation], list[int]]:
    pieces = [next(free) for _ in range(parts)]
    runs = [functools.partial(_cut, parts, axis, part) for part in range(parts)]
    made = zip(runs, pieces, strict=True)
    return [Operation("slice", run, (value,), (piece,)) for run, piece in made], pieces


def _cut(parts, axis, part, array):
    return (array if array.shape[axis] == 1 else jnp.split(array, parts, axis)[part],)


def _together(operation, inputs, axis, joined, free) -> list[Operation]:
    """The operation on the inputs of each part, and the whole of their outputs."""
    outputs = [next(free) for _ in inputs]
    joined[operation.outputs[0]] = axis, outputs
    made = zip(inputs, outputs, strict=True)
    whole = functools.partial(_whole, axis)
    return [
        *(operation._replace(inputs=given, outputs=(output,)) for given, output in made),
        Operation("concatenate", whole, tuple(outputs), operation.outputs),
    ]


def _whole(axis, *arrays):
    return (jnp.concatenate(arrays, axis),)
