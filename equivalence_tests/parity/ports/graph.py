"""A network as a graph of operations, the same for JAX and PyTorch.

A value is an integer. Every operation is a function of arrays of its framework, so a graph can be
evaluated from any of its values on, with any of its operations replaced.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

Value = int


class Operation(NamedTuple):
    """One operation of a network."""

    name: str
    """The framework's name of it, for example "conv_general_dilated" or "conv2d"."""

    run: Callable[..., tuple]
    """(arrays of the inputs) -> arrays of the outputs."""

    inputs: tuple[Value, ...]

    outputs: tuple[Value, ...]

    module: str = ""
    """PyTorch's name of the module that runs it; "" in JAX."""

    options: dict[str, Any] = {}
    """Static arguments, under the framework's names."""


class Graph(NamedTuple):
    """A network in one mode, evaluation or training."""

    operations: list[Operation]
    """In an order in which they can be evaluated."""

    leaves: dict[str, Value]
    """Parameters and statistics by name (PyTorch) or path (JAX)."""

    images: Value

    logits: Value

    after: dict[str, Value]
    """The leaves after the forward pass."""

    constants: dict[Value, Any]

    others: tuple[str, ...] = ()
    """Places of what PyTorch's network returns beside its logits."""

    rules: tuple = ()
    """JAX's calls of a `jax.custom_vjp`, of `rules.Rule`: the graph has their operations only."""

    narrow: bool = False
    """True if its author wrote narrower floats than float64 into it; the graph has none."""

    def producers(self) -> dict[Value, int]:
        """Index of the operation that computes each value."""
        return {v: i for i, op in enumerate(self.operations) for v in op.outputs}

    def needed(self, targets: Iterable[Value], known: Iterable[Value] = ()) -> list[int]:
        """Indices of the operations that lead from known values to the targets, in order."""
        known, stack = set(known), list(targets)
        producers, found = self.producers(), set()
        while stack:
            value = stack.pop()
            index = producers.get(value)
            if value in known or index is None or index in found:
                continue
            found.add(index)
            stack += self.operations[index].inputs
        return sorted(found)

    def _read(self, value: Value) -> set[Value]:
        """All values that a value is computed from, and itself."""
        return {v for i in self.needed([value]) for v in self.operations[i].inputs} | {value}

    def leaves_above(self, value: Value) -> set[str]:
        """Names of the leaves that a value is computed from."""
        read = self._read(value)
        return {name for name, leaf in self.leaves.items() if leaf in read}

    def moved(self) -> set[str]:
        """Names of the leaves that the forward pass changes."""
        return {name for name, value in self.leaves.items() if self.after[name] != value}

    def data(self) -> set[Value]:
        """All values that are computed from the images, and the images."""
        return self.below([self.images])

    def below(self, sources: Iterable[Value]) -> set[Value]:
        """All values that are computed from these, and these."""
        found = set(sources)
        for operation in self.operations:
            if found & set(operation.inputs):
                found.update(operation.outputs)
        return found

    def reads(self, value: Value, source: Value) -> bool:
        """True if a value is computed from another, or is it."""
        return source in self._read(value)

    def reads_images(self, value: Value) -> bool:
        """True if a value is computed from the images."""
        return self.reads(value, self.images)

    def evaluate(self, values: dict[Value, Any], indices: Iterable[int], replaced=None) -> dict:
        """Adds the constants and the outputs of these operations to `values`, which is returned.

        Args:
          values: the arrays that the operations start from.
          replaced: {index of an operation: a function in its place}.
        """
        values.update(self.constants)
        for index in indices:
            operation = self.operations[index]
            run = (replaced or {}).get(index, operation.run)
            arrays = [values[v] for v in operation.inputs]
            values.update(zip(operation.outputs, run(*arrays), strict=True))
        return values
