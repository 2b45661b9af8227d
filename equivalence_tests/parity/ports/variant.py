"""Another way to run an operation of PyTorch, and how its arguments are read."""

from collections.abc import Callable
from typing import Any, NamedTuple

from equivalence_tests.parity.ports.graph import Operation


class Variant(NamedTuple):
    """Another way to run an operation."""

    reason: str
    """A sentence about the difference, without its layer."""

    run: Callable[..., tuple] | None

    options: dict[str, Any] = {}
    """Options of `exported.batch_norm` that differ, so that several variants can be joined."""


def arguments(operation: Operation, names: str) -> dict[str, Any]:
    """The static arguments of an operation by name, from those that stand after its arrays."""
    given = [a for a in operation.options.get("args", ()) if not hasattr(a, "op")]
    given = operation.options.get("arguments", given)
    return dict(zip(names.split(), given, strict=False)) | operation.options.get("kwargs", {})


def pair(value) -> tuple[int, int]:
    """One number for height and width, or both."""
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
