"""Weights of another run to start from."""

from pathlib import Path

import numpy as np
from torch import nn

from flax_resnet.errors import InputError
from flax_resnet.text import listed
from torch_ref import checkpoint
from torch_ref.directory import WEIGHTS


def load_weights(source: Path) -> dict[str, np.ndarray]:
    """The weights in a file, or in the directory of a run.

    Raises:
      InputError: there are none, or they are damaged.
    """
    path = source / WEIGHTS if source.is_dir() else source
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    return checkpoint.load(path)


def fine_tune(model: nn.Module, source: Path, *, new_head: bool = False) -> None:
    """Load weights into `model`, all but its last linear layer if that is to be new or is of
    another shape there.

    Raises:
      InputError: the weights are damaged, or of another network.
    """
    arrays, own = load_weights(source), model.state_dict()
    head = {name: tensor for name, tensor in own.items() if name.startswith("fc.")}
    fits = all(name in arrays and arrays[name].shape == head[name].shape for name in head)
    if new_head or not fits:
        arrays |= checkpoint.to_arrays(head)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: array.shape for name, array in arrays.items()}
    if wrong := [name for name in shapes | given if shapes.get(name) != given.get(name)]:
        raise InputError(
            f"{source}: of another network: missing, unexpected or of another shape:"
            f" {listed(wrong)}"
        )
    model.load_state_dict(checkpoint.to_tensors(arrays))
