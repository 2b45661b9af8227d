"""A user's own PyTorch network, run and recorded under torchvision's names."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from equivalence_tests.parity import engine, loading, outputs
from equivalence_tests.parity.inputs import Case
from flax_resnet.errors import InputError
from flax_resnet.weights import convert
from torch_ref import checkpoint


def load(place: str) -> nn.Module:
    """Like `read`, but the network has dropout off, is float64, has no frozen parameters and
    returns its logits alone."""
    model = read(place)
    drop_nothing(model)
    model.register_forward_hook(
        lambda _, images, output: outputs.logits(
            output, len(images[0]), torch.is_floating_point, "--torch-model"
        )
    )
    return model.double().requires_grad_(True)


def read(place: str) -> nn.Module:
    """Imports "package.module:callable" and calls it.

    Raises:
      InputError: the callable cannot be imported, raises, or returns no network.
    """
    model = loading.load(place, "--torch-model")
    if not isinstance(model, nn.Module):
        raise InputError(f"--torch-model {place} returns {type(model).__name__}, no nn.Module")
    check_initialised(model)
    return model


def check_initialised(model: nn.Module):
    """Raises InputError if a Lazy layer of a network has not seen its first input."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise InputError(
                f"the PyTorch network's {name} has no shape yet; call the network once on an image"
            )


def drop_nothing(model: nn.Module):
    """Switches dropout and stochastic depth off in training, where their draws cannot be compared.

    In evaluation they keep what they do, which should be nothing.
    """
    for part in model.modules():
        if loading.drops(part):
            part.forward = _without_draws(part)
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0


def _without_draws(part: nn.Module) -> Callable:
    forward = part.forward

    def call(values, *args, **options):
        return values if part.training else forward(values, *args, **options)

    return call


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and running statistics under torchvision's names, float64."""
    return convert.translate_names(checkpoint.to_arrays(model.state_dict()))


def fill(model: nn.Module, arrays: dict[str, np.ndarray]):
    """Load weights with torchvision's names into the model."""
    model.load_state_dict(
        {own: torch.from_numpy(np.array(arrays[ours])) for own, ours in _names(model).items()}
    )


def trace(model: nn.Module, case: Case, *, train: bool) -> engine.Trace:
    """The trace of the model on a case; in training mode its weights change.

    Raises:
      InputError: the forward pass raises.
    """
    names = _names(model)
    modules = {own.rpartition(".")[0]: ours.rpartition(".")[0] for own, ours in names.items()}
    try:
        raw = engine.run_torch(case, train=train, model=model)
    except InputError:
        raise
    except Exception as error:  # whatever the user's own code raises
        size = "x".join(map(str, case.images.shape[1:]))
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--torch-model: its forward pass of {size} raises {reason}") from error
    return {
        phase: {
            _renamed(name, modules if phase == "forward" else names): array
            for name, array in arrays.items()
        }
        for phase, arrays in raw.items()
    }


def _names(model) -> dict[str, str]:
    """The model's own names of parameters and statistics -> torchvision's names."""
    own = {name: name for name in model.state_dict()}
    return {name: ours for ours, name in convert.translate_names(own).items()}


def _renamed(name: str, names: dict) -> str:
    """Replaces the part of a name before its first space or colon."""
    for mark in " ", ":":
        head, found, tail = name.partition(mark)
        if found:
            return names.get(head, head) + mark + tail
    return names.get(name, name)
