"""Converts between PyTorch's weights and NNX leaves with one table, a strict bijection.

Example: torch's `layer1.0.conv1.weight` [O, I, kh, kw] is NNX's `layer1.0.conv1.kernel`
[kh, kw, I, O]. Every conversion copies, so that neither side can write into the other.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resnet.config import WITH_SHORTCUTS, WITH_STEMS
from flax_resnet.errors import InputError, check_type
from flax_resnet.models import create_model, list_models
from flax_resnet.models.resnet import CONSTRUCTORS
from flax_resnet.text import listed, most, printable
from flax_resnet.weights import names

# {(NNX leaf, rank): (torch leaf, axes that transpose a torch array to NNX)}
_LEAVES = {
    ("kernel", 4): ("weight", (2, 3, 1, 0)),  # OIHW -> HWIO; I is already I / groups in both
    ("kernel", 2): ("weight", (1, 0)),
    ("scale", 1): ("weight", (0,)),
    ("bias", 1): ("bias", (0,)),
    ("mean", 1): ("running_mean", (0,)),
    ("var", 1): ("running_var", (0,)),
    ("num_batches_tracked", 0): ("num_batches_tracked", ()),
}

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".pth.tar", ".ckpt", ".bin")

MOST_CLASSES, MOST_CHANNELS = 1_000_000, 1_000
MOST_FAULTS = 5

# The order of attributes in torch; nnx.merge sorts them alphabetically.
_ORDER = """conv1 bn1 conv2 bn2 conv3 bn3 downsample layers layer1 layer2 layer3 layer4 fc1 fc
kernel scale bias mean var num_batches_tracked""".split()


def torch_name(path: tuple, rank: int) -> str:
    """The torch name of an NNX path: "layer1.0.bn1.weight" for ("layer1", 0, "bn1", "scale")."""
    leaf, _ = _LEAVES[path[-1], rank]
    # The attribute `layers` of a Projection has no name in torch's Sequential.
    return ".".join(str(part) for part in (*path[:-1], leaf) if part != "layers")


def torch_shape(path: tuple, shape: tuple) -> tuple[int, ...]:
    """The shape of an NNX leaf in torch's layout."""
    _, axes = _LEAVES[path[-1], len(shape)]
    return tuple(shape[axis] for axis in np.argsort(axes))


def to_torch_layout(path: tuple, value) -> np.ndarray:
    """A contiguous copy of an NNX leaf in torch's layout."""
    value = np.asarray(value)
    _, axes = _LEAVES[path[-1], value.ndim]
    return np.array(value.transpose(np.argsort(axes)), order="C")


def to_nnx_layout(path: tuple, value) -> np.ndarray:
    """A contiguous copy of a torch array in NNX's layout; the inverse of `to_torch_layout`."""
    value = np.asarray(value)
    _, axes = _LEAVES[path[-1], value.ndim]
    return np.array(value.transpose(axes), order="C")


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return all parameters and running statistics under torchvision's names, in torch's layouts.

    Returns:
      Copies in torch's order: convolutions `[O, I, kh, kw]`, linear layers `[O, I]`, BatchNorm
      `[C]`. `num_batches_tracked` is int64, as in torch.

    Examples:
      >>> model = flax_resnet.create_model("resnet20", num_classes=10)
      >>> flax_resnet.state_dict(model)["conv1.weight"].shape
      (16, 3, 3, 3)
    """
    check_type("model", model, nnx.Module, "an nnx.Module")
    found = {}
    for path, variable in sorted(_variables(model), key=_position):
        name = torch_name(path, variable[...].ndim)
        found[name] = _widen(to_torch_layout(path, variable[...]), name)
    return found


def state_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `state_dict`, in its order; `nnx.eval_shape` may have made the model."""
    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {
        torch_name(path, len(leaf.shape)): torch_shape(path, leaf.shape)
        for path, leaf in sorted(leaves, key=_position)
    }


def load_state_dict(model: nnx.Module, arrays: dict[str, np.ndarray]) -> nnx.Module:
    """Fill a model with weights from PyTorch.

    Args:
      model: a model of `create_model`, which is changed in place.
      arrays: {name: array} with the names of torchvision, timm, Hugging Face or pytorch-cifar,
        with or without the prefixes of Lightning, DataParallel and torch.compile. Arrays of half
        precision become float32. All `num_batches_tracked` may be missing, as in files from before
        torch 0.4.1.

    Returns:
      The model.

    Raises:
      InputError: entries are missing, unexpected, misshaped or non-finite. The message names them
        and the nearest architecture, and the model stays as it was.

    Examples:
      >>> arrays = flax_resnet.state_dict(flax_resnet.create_model("resnet20"))
      >>> model = flax_resnet.load_state_dict(flax_resnet.create_model("resnet20"), arrays)
    """
    check_type("model", model, nnx.Module, "an nnx.Module")
    arrays = conform(arrays, state_shapes(model))
    variables = [(torch_name(path, v[...].ndim), path, v) for path, v in _variables(model)]
    types = {name: variable[...].dtype for name, _, variable in variables}
    if beyond := [name for name in types if not _fits(arrays[name], types[name])]:
        raise InputError(f"too large for {types[beyond[0]]}: {listed(beyond)}")
    for name, path, variable in variables:
        value = to_nnx_layout(path, arrays[name])
        variable[...] = jnp.array(value, dtype=types[name])  # jnp.array always copies
    return model


def conform(arrays: dict[str, np.ndarray], shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Weights in any naming scheme, converted to the names and shapes of `state_shapes`, in its
    order.

    Returns:
      Contiguous copies; half precision as float32, counts as int64.

    Raises:
      InputError: as in `load_state_dict`.
    """
    arrays = translate_names(_as_arrays(arrays))
    if not arrays:
        raise InputError("no weights are given")
    if not any(map(_is_count, arrays)):
        arrays |= {name: np.zeros((), np.int64) for name in filter(_is_count, shapes)}
    if found := faults(shapes, arrays):
        found.append(f"the nearest architecture is {_describe_nearest(arrays)}")
        raise InputError("weights do not fit the model: " + "; ".join(found))
    return {name: _widen(np.array(arrays[name], order="C"), name) for name in shapes}


def _as_arrays(arrays) -> dict[str, np.ndarray]:
    """The values as NumPy arrays; InputError if `arrays` is no mapping of names to arrays."""
    if not isinstance(arrays, Mapping):
        raise InputError(f"weights are a dict of names and arrays, got {type(arrays).__name__}")
    converted = {}
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise InputError(f"names of weights are text, got {printable(repr(name))}")
        try:
            converted[name] = np.asarray(array)
        except Exception:  # torch raises many kinds, e.g. for bfloat16 or with requires_grad
            raise InputError(
                f"{printable(name)} is a {type(array).__name__} that NumPy does not take; for a"
                " tensor give tensor.detach().float().cpu().numpy()"
            ) from None
    return converted


class Architecture(NamedTuple):
    """The arguments with which `create_model` makes a network."""

    arch: str
    num_classes: int
    in_channels: int
    stem: str | None
    shortcut: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`state_shapes` of the network, computed without making it."""
        return _architecture_shapes(self)

    def __str__(self):
        stem = f", stem {self.stem}" if self.stem else ""
        shortcut = f", shortcut {self.shortcut}" if self.shortcut else ""
        kind = f"{self.num_classes} classes, {self.in_channels} channels{stem}{shortcut}"
        return f"{self.arch} ({kind})"


def has_head(arrays: dict[str, np.ndarray]) -> bool:
    """True if the arrays (torchvision's names) include the last linear layer."""
    return any(name.startswith("fc.") for name in arrays)


def has_body(arrays: dict[str, np.ndarray], shapes: dict[str, tuple]) -> bool:
    """True if the arrays include more than half of a network's entries."""
    return 2 * len(shapes.keys() & arrays.keys()) > len(shapes)


def describe(
    arrays: dict[str, np.ndarray], arch: str, stem: str | None = None, shortcut: str | None = None
) -> Architecture:
    """The architecture of weights: classes and channels from their shapes, and stem and shortcut,
    too, if they are not given."""
    head, first = (np.shape(arrays.get(name)) for name in ("fc.weight", "conv1.weight"))
    if stem is None and arch in WITH_STEMS:
        stem = "cifar" if first[2:] == (3, 3) else "imagenet"
    # Limited to what can be made; `conform` reports how a strange file differs from it.
    in_channels = min(max(1, first[1]), MOST_CHANNELS) if len(first) == 4 else 3
    num_classes = min(max(1, head[0]), MOST_CLASSES) if len(head) == 2 else 10
    projects = arch in WITH_SHORTCUTS and any(".downsample." in name for name in arrays)
    shortcut = shortcut or ("projection" if projects else None)
    return Architecture(arch, num_classes, in_channels, stem, shortcut)


def nearest_architecture(arrays: dict[str, np.ndarray]) -> Architecture:
    """The network whose names and shapes differ least from the arrays' (torchvision's names)."""
    depths = _depths(arrays)
    distances = {arch: _distance(depths, _DEPTHS[arch]) for arch in list_models()}
    # Computing shapes takes 0.1 to 1 s per network, so only the nearest depths are compared.
    close = [arch for arch, d in distances.items() if d == min(distances.values())]
    candidates = [describe(arrays, arch) for arch in close]
    return min(candidates, key=lambda c: len(differing(c.shapes(), arrays)))


def differing(shapes: dict[str, tuple], arrays: dict[str, np.ndarray]) -> set[str]:
    """Names that one side lacks or has in another shape, except counts of batches."""
    given = {name: np.shape(array) for name, array in arrays.items()}
    return {name for name, _ in shapes.items() ^ given.items() if not _is_count(name)}


def translate_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under torchvision's names, converted from any naming scheme and prefix."""
    return names.translated(names.without_prefix(arrays))


def faults(shapes: dict[str, tuple], arrays: dict[str, np.ndarray]) -> list[str]:
    """Messages about all differences of the arrays from finite ones of these names and shapes."""
    missing, extra = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    found = [f"missing {listed(missing)}"] if missing else []
    found += [f"unexpected {listed(extra)}"] if extra else []
    both = sorted(shapes.keys() & arrays.keys())
    wrong = [fault for name in both if (fault := _fault(name, arrays[name], shapes[name]))]
    return found + wrong[: most(MOST_FAULTS)] + _more(len(wrong) - most(MOST_FAULTS))


def _fault(name: str, array, shape: tuple) -> str | None:
    """The fault of one entry, or None."""
    array, name = np.asarray(array), printable(name)
    whole, floating = (jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.floating))
    if array.shape != shape:
        return f"{name} has shape {array.shape} instead of {shape}"
    if not (floating or (whole and _is_count(name))):
        return f"{name} has type {array.dtype} instead of a floating one"
    if not np.isfinite(array).all():
        return f"{name} has non-finite values"
    if _is_count(name) and ((array < 0) | (array >= 2.0**63) | (array != np.floor(array))).any():
        return f"{name} is {array}, no count"
    if name.endswith("running_var") and (array < 0).any():
        return f"{name} has negative values"
    return None


def _more(count: int) -> list[str]:
    return [f"{count:,} more"] if count > 0 else []


def _is_count(name: str) -> bool:
    return name.rpartition(".")[-1] in ("num_batches_tracked", "step")


def _describe_nearest(arrays) -> str:
    nearest = nearest_architecture(arrays)
    count = len(differing(nearest.shapes(), arrays))
    return f"{nearest}, " + (f"with {count} other entries" if count else "which has these shapes")


@functools.cache
def _architecture_shapes(architecture: Architecture) -> dict:
    return state_shapes(nnx.eval_shape(lambda: create_model(**architecture._asdict())))


_DEPTHS = {arch: CONSTRUCTORS[arch].args[-1] for arch in CONSTRUCTORS} | {"basic_cnn": ()}


def _fits(array: np.ndarray, dtype) -> bool:
    limits = jnp.finfo(dtype) if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype)
    return not array.size or float(np.abs(array).max()) <= float(limits.max)


def _depths(arrays) -> tuple[int, ...]:
    """The number of blocks in each stage; numbers of three or more digits do not count blocks."""
    found = {}
    for name in arrays:
        if m := re.match(r"layer(\d)\.(\d{1,2})\.", name):
            found[int(m[1])] = max(found.get(int(m[1]), 0), int(m[2]) + 1)
    return tuple(found.get(stage, 0) for stage in range(1, max(found, default=0) + 1))


def _distance(depths, others) -> int:
    pairs = itertools.zip_longest(depths, others, fillvalue=0)
    return sum(abs(one - other) for one, other in pairs)


def _position(item) -> list[int]:
    """Sort key of a (path, variable): its position in torch's state_dict."""
    return [part if isinstance(part, int) else _ORDER.index(part) for part in item[0]]


def _widen(value: np.ndarray, name: str) -> np.ndarray:
    if _is_count(name):
        return value.astype(np.int64)
    return value.astype(np.float32) if value.dtype.itemsize < 4 else value


def _variables(module, prefix=()):
    """Yields (path, variable) for all parameters and statistics."""
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    for name, child in children:
        if isinstance(child, nnx.Param | nnx.BatchStat):
            if child[...] is not None:
                yield (*prefix, name), child
        elif isinstance(child, nnx.Module):
            yield from _variables(child, (*prefix, name))
