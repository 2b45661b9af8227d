"""The type of a mutant (a fault to inject by name), and its injection."""

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

from flax import nnx

from flax_resnet.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFault:
    """A fault in modules of one type."""

    kind: type
    """Type of the modules that can have the fault."""

    edit: Callable[[nnx.Module], None]
    """Changes a module in place."""

    eligible: Callable[[nnx.Module], bool] = lambda module: True
    """True if a module of this type has the part that the fault changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A known difference, injected everywhere by `injected` or into one layer by `layer`."""

    name: str

    difference: str
    """Number of the known difference, and a letter if it has several parts."""

    what: str
    """Behaviour of the faulty code, which PyTorch does not have."""

    phase: str | None = None
    """The first phase of a training step that shows the fault; None: no phase does."""

    patches: tuple = ()
    """(owner, attribute, faulty value) of every patch that injects the fault everywhere."""

    layer: LayerFault | None = None
    """The fault as a change of one layer; `injected` uses it on every layer without `patches`."""


@contextlib.contextmanager
def injected(mutant: Mutant):
    """Within this context flax_resnet and Optax have the fault everywhere."""
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
    """The modules of a model that can have the fault, by torch's names."""
    fault = mutant.layer
    return {
        name: module
        for name, module in layers.module_names(model).items()
        if isinstance(module, fault.kind) and fault.eligible(module)
    }
