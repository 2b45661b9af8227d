"""A fault, and how it is put in."""

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFault:
    """A fault of one module."""

    kind: type
    """Of the module."""

    edit: Callable[[nnx.Module], None]
    """Puts the fault in, in place."""

    eligible: Callable[[nnx.Module], bool] = lambda module: True
    """Whether the module has what the fault changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str

    difference: str
    """Number of the known difference, and a letter for its parts."""

    what: str
    """What the faulty code does; PyTorch does the opposite."""

    phase: str | None = None
    """The first phase of a training step that shows it; None: none does."""

    patches: tuple = ()
    """(owner, attribute, faulty value), to put it in everywhere."""

    layer: LayerFault | None = None
    """To put it into one layer; without `patches` also into every one."""


@contextlib.contextmanager
def injected(mutant: Mutant):
    """Within this context flax_resnet and Optax have the fault, everywhere."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in mutant.patches:
            if isinstance(owner, dict):
                stack.enter_context(mock.patch.dict(owner, {name: value}))
            else:
                stack.enter_context(mock.patch.object(owner, name, value))
        if mutant.layer and not mutant.patches:
            stack.enter_context(_edited_when_made(mutant.layer))
        yield


def _edited_when_made(fault: LayerFault):
    original = fault.kind.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if fault.eligible(self):
            fault.edit(self)

    return mock.patch.object(fault.kind, "__init__", init)


def eligible_layers(mutant: Mutant, model: nnx.Module) -> dict[str, nnx.Module]:
    """Torch's names of the modules that can have the fault."""
    fault = mutant.layer
    return {
        ".".join(str(part) for part in path if part != "layers"): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, fault.kind) and fault.eligible(module)
    }
