"""Weights of another run to start from."""

from pathlib import Path

from torch import nn

from torch_ref import checkpoint


def start_from(model: nn.Module, source: Path, *, new_head: bool = False) -> None:
    """Load weights into `model`, all but its last linear layer if that is to be new or is of
    another shape there.

    Args:
      source: a weights file, or the directory of a run.

    Raises:
      ValueError: the file is damaged, or of another network.
    """
    arrays = checkpoint.load(source / "weights.pth" if source.is_dir() else source)
    own = model.state_dict()
    head = [name for name in own if name.startswith("fc.")]
    fits = all(name in arrays and arrays[name].shape == own[name].shape for name in head)
    if new_head or not fits:
        arrays |= checkpoint.to_arrays({name: own[name] for name in head})
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: array.shape for name, array in arrays.items()}
    if wrong := [name for name in shapes | given if shapes.get(name) != given.get(name)]:
        count = f" and {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
        names = ", ".join(f"{name[:80]!r}" for name in wrong[:5])
        raise ValueError(
            f"{source}: of another network: missing, unexpected or of another shape: {names}{count}"
        )
    model.load_state_dict(checkpoint.to_tensors(arrays))
