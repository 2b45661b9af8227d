"""Weights and images for a PyTorch network of any kind, at which a fault cannot hide.

BatchNorm's parameters and statistics are all different, images have sides of different lengths,
and every strided layer sees a side that its stride divides and one that it does not.
"""

import copy
import itertools

import numpy as np
import torch
from torch import nn

from equivalence_tests.parity import inputs, sizes
from equivalence_tests.parity.ports import exported, wide
from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.layouts import nchw
from flax_resnet.errors import InputError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

SMALLEST = 40
"""Smallest side that is tried. Five halvings of 40 pixels leave two."""

FIXED = (224, 256, 32, 28, 64, 128, 384)
"""Sides that are tried for a network that takes one size only."""


def prepared(net: nn.Module) -> nn.Module:
    """A copy in float64.

    Raises:
      InputError: a BatchNorm has no momentum, or the network cannot be copied.
    """
    for name, module in net.named_modules():
        if _keeps_statistics(module) and module.momentum is None:
            why = "an average over all batches, which cannot be followed; give it a momentum"
            raise InputError(f"the BatchNorm {name} has momentum=None, {why}")
    constants = {n: exported.lifted(b) for n, b in net.named_buffers() if b.is_floating_point()}
    try:
        net = copy.deepcopy(net).double()
    except Exception as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the PyTorch network cannot be copied: {reason}") from error
    wide.widen(net)
    for name, buffer in net.named_buffers():
        if name in constants:
            buffer.data.copy_(constants[name])
    return net


def parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name; one that several modules share is there under each of its names."""
    return dict(net.named_parameters(remove_duplicate=False))


def state(net: nn.Module, used: set[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Parameters and buffers by name, and {another name of one of them: the name it is under}.

    Args:
      used: names that the network's graphs use, which a shared tensor is kept under.
    """
    tensors = net.state_dict(keep_vars=True) | dict(net.named_buffers(remove_duplicate=False))
    names = {}
    for name in sorted(tensors, key=lambda n: n not in used):
        names.setdefault(id(tensors[name]), name)
    aliases = {n: names[id(t)] for n, t in tensors.items() if n not in used}
    aliases = {alias: name for alias, name in aliases.items() if alias != name}
    found = {n: t.detach().numpy().copy() for n, t in tensors.items() if n not in aliases}
    return found, aliases


def image_shape(net: nn.Module, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(H, W, C) of the images that a network takes.

    Raises:
      InputError: the network takes none of the sizes that are tried.
    """
    for channels in (known := _channels(net)):
        if size is None:
            try:
                return *image_size(net, channels), channels
            except InputError:
                if channels == known[-1]:
                    raise
        elif len(known) == 1 or sizes.layers(net, size, channels) is not None:
            return *size, channels
    return *size, known[0]  # the network raises, which is told later


def _channels(net: nn.Module) -> tuple[int, ...]:
    """Channels of images, from a network's first kernel; several to try without a kernel."""
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None:
        return tuple(dict.fromkeys((first.in_channels, 3, 1)))  # pixels may be put into channels
    kernel = next((p for p in net.parameters() if p.ndim == 4), None)
    return (3, 1) if kernel is None else (kernel.shape[1],)


def image_size(net: nn.Module, channels: int) -> tuple[int, int]:
    """A size (H, W) at which no padding can hide; for a network of one size, that size.

    Raises:
      InputError: the network takes none of the sizes that are tried.
    """
    for size in itertools.islice(sizes.pairs(SMALLEST), 200):
        if (found := sizes.faults(net, (size, size[::-1]), channels)) is None:
            break
        if not found:
            return size
    for side in FIXED:
        if sizes.layers(net, (side, side), channels) is not None:
            return side, side
    raise InputError("the PyTorch network takes no image size that was tried; give one")


def fill(net: nn.Module, images: np.ndarray, rng: np.random.Generator):
    """Random parameters and statistics; those of BatchNorm are near the statistics of the images.

    Args:
      images: `[B, H, W, C]`.
    """
    with torch.no_grad():
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(torch.as_tensor(_random(module, name, parameter.shape, rng)))
        try:
            _settle(net, images)
        except Exception as error:  # whatever the user's own code raises
            size = "x".join(map(str, images.shape[1:]))
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            message = f"the PyTorch network raises on images of {size}: {reason}"
            raise InputError(message) from error
        for module in net.modules():
            if _keeps_statistics(module):
                _spread(module, rng)
            elif getattr(module, "running_var", None) is not None:  # torchvision's frozen BatchNorm
                for buffer in module.buffers(recurse=False):
                    buffer.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, buffer.shape)))


def _keeps_statistics(module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and module.running_var is not None


def _random(module, name, shape, rng) -> np.ndarray:
    if isinstance(module, NORMS) and name == "weight":
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) < 2 or name == "bias":
        return rng.standard_normal(shape) * 0.3
    spread = np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.3
    return rng.standard_normal(shape) * spread * 1.4


def _settle(net, images):
    """Runs the images once, so that running statistics are the batch's."""
    momenta = {m: m.momentum for m in net.modules() if _keeps_statistics(m)}
    training = net.training
    for module in momenta:
        module.momentum = 1.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the masks of dropout
        net.train()(nchw(images))
    for module, momentum in momenta.items():
        module.momentum = momentum
    net.train(training)


def _spread(module, rng):
    """Statistics that are none of the batch's own."""
    shape = tuple(module.running_var.shape)
    shift = torch.from_numpy(rng.standard_normal(shape) * 0.3)
    module.running_mean += shift * module.running_var.sqrt()
    module.running_var *= torch.from_numpy(rng.uniform(0.7, 1.4, shape))
    module.running_var += 1e-3
    module.num_batches_tracked += int(rng.integers(1, 1000))


def faults(state: dict, graph: Graph, images: np.ndarray) -> list[str]:
    """Reasons why a fault could hide behind these weights and values; [] if there are none.

    Args:
      graph: PyTorch's, in evaluation mode.
      images: `[B, H, W, C]`.
    """
    values = {v: torch.as_tensor(state[n]) for n, v in graph.leaves.items()}
    values[graph.images] = nchw(images)
    with torch.no_grad():
        graph.evaluate(values, range(len(graph.operations)))
    return [
        *_equal_vectors(state),
        *_one_sided(graph, values),
        *_large_batches(graph, values),
    ]


def _equal_vectors(state) -> list[str]:
    found = []
    for module in dict.fromkeys(n.rpartition(".")[0] for n in state if n.endswith("running_var")):
        names = [f"{module}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        vectors = {n: state[n] for n in names if n in state}
        found += [f"{n} is constant" for n, a in vectors.items() if a.size > 1 and np.ptp(a) == 0]
        found += [
            f"{a} and {b} are equal"
            for a, b in itertools.combinations(vectors, 2)
            if np.array_equal(vectors[a], vectors[b])
        ]
    return found


def _one_sided(graph, values) -> list[str]:
    found, positive = [], set()
    for operation in graph.operations:
        if operation.name in POSITIVE or _keeps(operation, positive):
            positive.update(operation.outputs)
        if operation.name == "relu" and operation.inputs[0] not in positive:
            x = values[operation.inputs[0]]
            if x.min() >= 0 or x.max() <= 0:
                found.append(f"{operation.module or 'a ReLU'} sees one sign only")
    return found


def _keeps(operation, positive) -> bool:
    """True of a sum or product of two such values, and of a pool or view of one."""
    several = operation.name not in ("add", "mul") or len(operation.inputs) == 2
    return operation.name in KEEPING and several and positive.issuperset(operation.inputs)


POSITIVE = {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax"}
"""Operations whose output has no negative number, so that a ReLU behind them does nothing."""

KEEPING = {
    "add", "mul", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "amax", "cat", "view",
    "flatten", "unsqueeze",
}  # fmt: skip
"""Operations that make no negative number out of numbers that are not negative."""


def _large_batches(graph, values) -> list[str]:
    found = []
    for operation in graph.operations:
        if operation.name == exported.BATCH_NORM:
            x = values[operation.inputs[0]]
            if x.numel() // x.shape[1] > inputs.MOST_VALUES:
                found.append(f"{operation.module} sees too many values to show n / (n - 1)")
    return found
