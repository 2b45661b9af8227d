"""PyTorch's weights <-> NNX leaves: one table, used both ways, a strict bijection.

Images of a name: torch `layer1.0.conv1.weight` [O, I, kh, kw] <-> NNX `layer1.0.conv1.kernel`
[kh, kw, I, O]. Every crossing copies, so that neither side can write into the other.
"""

import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resnet.config import InputError

# NNX leaf and rank -> torch leaf, axes that bring a torch array to NNX (and their inverse back).
_LEAVES = {
    ("kernel", 4): ("weight", (2, 3, 1, 0)),  # OIHW -> HWIO; I is already I / groups in both
    ("kernel", 2): ("weight", (1, 0)),
    ("scale", 1): ("weight", (0,)),
    ("bias", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
    ("num_batches_tracked", 0): ("num_batches_tracked", ()),
}

# The order of torch's definitions; nnx.merge brings attributes into that of the alphabet.
_ORDER = """conv1 bn1 conv2 bn2 conv3 bn3 downsample layers layer1 layer2 layer3 layer4 fc1 fc
kernel scale bias mean var num_batches_tracked""".split()

_WRAPPERS = re.compile(r"^(?:module|_orig_mod|model|net|network|backbone)\.")

# Names of other projects -> torchvision's. timm's are torchvision's already.
_DIALECTS = [
    # pytorch-cifar and its descendants
    (r"\bshortcut\.(\d)\.", r"downsample.\1."),
    (r"^linear\.", "fc."),
    # Hugging Face ResNetForImageClassification
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\bshortcut\.convolution\.", "downsample.0."),
    (r"\bshortcut\.normalization\.", "downsample.1."),
    (r"\blayer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}."),
    (r"\blayer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}."),
    (r"^classifier\.1\.", "fc."),
]


def torch_name(path: tuple, rank: int) -> str:
    """An NNX path such as ("layer1", 0, "conv1", "kernel") -> "layer1.0.conv1.weight"."""
    leaf, _ = _LEAVES[path[-1], rank]
    # A Projection keeps its two layers in a list that torch's Sequential does not name.
    return ".".join(str(part) for part in (*path[:-1], leaf) if part != "layers")


def torch_shape(path: tuple, shape: tuple) -> tuple[int, ...]:
    """The shape of one NNX leaf in torch's layout."""
    _, axes = _LEAVES[path[-1], len(shape)]
    return tuple(shape[axis] for axis in np.argsort(axes))


def to_torch_layout(path: tuple, value) -> np.ndarray:
    """A copy of one NNX leaf in torch's layout, contiguous."""
    value = np.asarray(value)
    _, axes = _LEAVES[path[-1], value.ndim]
    return np.array(value.transpose(np.argsort(axes)), order="C")


def to_nnx_layout(path: tuple, value) -> np.ndarray:
    """A copy of one torch array in NNX's layout, contiguous; the inverse of `to_torch_layout`."""
    value = np.asarray(value)
    _, axes = _LEAVES[path[-1], value.ndim]
    return np.array(value.transpose(axes), order="C")


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """All parameters and running statistics under torchvision's names, in torch's layouts.

    Returns:
      Copies, in torch's order of names: conv `[O, I, kh, kw]`, linear `[O, I]`, BatchNorm `[C]`;
      `num_batches_tracked` is int64 as in torch.
    """
    return {
        torch_name(path, variable[...].ndim): _widen(to_torch_layout(path, variable[...]))
        for path, variable in sorted(_variables(model), key=_position)
    }


def load_state_dict(model: nnx.Module, arrays: dict[str, np.ndarray]) -> nnx.Module:
    """Fill a model with weights from PyTorch.

    Args:
      model: any of ours; changed in place.
      arrays: torchvision's names, or timm's, Hugging Face's, pytorch-cifar's, with or without the
        prefixes of Lightning, DataParallel and torch.compile. Half precision is widened.
        `num_batches_tracked` may be missing throughout, as in files older than torch 0.4.1.

    Returns:
      The model.

    Raises:
      InputError: all missing, unexpected, misshaped and non-finite entries, in one message;
        nothing is loaded then.
    """
    arrays = translate_names(arrays)
    targets = {torch_name(path, v[...].ndim): (path, v) for path, v in _variables(model)}
    if not any(name.endswith("num_batches_tracked") for name in arrays):
        arrays |= {n: np.zeros((), np.int64) for n in targets if n.endswith("num_batches_tracked")}
    faults = _faults(targets, arrays)
    if faults:
        raise InputError("weights do not fit the model: " + "; ".join(faults))
    for name, (path, variable) in targets.items():
        value = to_nnx_layout(path, arrays[name])
        variable[...] = jnp.array(value, dtype=variable[...].dtype)  # jnp.array always copies
    return model


def translate_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays under torchvision's names, whatever dialect they came in."""
    while arrays and all(_WRAPPERS.match(name) for name in arrays):
        prefix = _WRAPPERS.match(next(iter(arrays)))[0]
        if not all(name.startswith(prefix) for name in arrays):
            break
        arrays = {name.removeprefix(prefix): value for name, value in arrays.items()}
    names = {}
    for name in arrays:
        names.setdefault(_translate(name), []).append(name)
    if twice := [" and ".join(same) for same in names.values() if len(same) > 1]:
        raise InputError(f"weights given twice: {'; '.join(twice)}")
    return {name: arrays[same[0]] for name, same in names.items()}


def _translate(name: str) -> str:
    for pattern, replacement in _DIALECTS:
        name = re.sub(pattern, replacement, name)
    return name


def _faults(targets, arrays) -> list[str]:
    missing = sorted(targets.keys() - arrays.keys())
    extra = sorted(arrays.keys() - targets.keys())
    faults = [f"missing {', '.join(missing)}"] if missing else []
    faults += [f"unexpected {', '.join(extra)}"] if extra else []
    for name in sorted(targets.keys() & arrays.keys()):
        path, variable = targets[name]
        expected, got = torch_shape(path, variable[...].shape), np.shape(arrays[name])
        if expected != got:
            faults.append(f"{name} has shape {got} instead of {expected}")
        elif not np.isfinite(np.asarray(arrays[name])).all():
            faults.append(f"{name} has non-finite values")
    return faults


def _position(item) -> list[int]:
    """Where torch has a (path, variable)."""
    return [part if isinstance(part, int) else _ORDER.index(part) for part in item[0]]


def _widen(value: np.ndarray) -> np.ndarray:
    return value.astype(np.int64) if value.dtype == np.int32 else value


def _variables(module, prefix=()):
    """(path, variable) of all parameters and statistics."""
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, child in children:
        if isinstance(child, nnx.Param | nnx.BatchStat):
            if child[...] is not None:
                yield (*prefix, name), child
        elif isinstance(child, nnx.Module):
            yield from _variables(child, (*prefix, name))
