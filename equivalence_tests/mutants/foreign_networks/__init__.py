"""One small ResNet in PyTorch and in four JAX frameworks, with faults that a test puts in by name.

This file has what all have in common. Each framework's file adds convolution, BatchNorm, dense
layer and pool.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTHS = 8, 16, 32
CLASSES = 5


class Layer(NamedTuple):
    """A layer with weights."""

    kind: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1


FAULTS = {
    "conv": ("SAME padding", "stride in the next", "rotated kernel", "transposed kernel"),
    "norm": (
        "eps 1e-3", "decay 0.99", "biased variance",
        "running statistics in training", "batch statistics in evaluation",
    ),
    "relu": ("missing", "leaky"),
    "gelu": ("missing", "tanh"),
    "maxpool": ("SAME padding", "no padding"),
    "add": ("ReLU before", "stopped gradient"),
    "avgpool": ("padding counted", "maximum"),
    "dense": ("no bias",),
}  # fmt: skip


def layers(faults: dict[str, str], stem: int) -> dict[str, Layer]:
    """The layers with weights under torchvision's names; `stem` is the first kernel's size."""
    table = {"conv1": Layer("conv", 3, WIDTHS[0], stem, 2), "bn1": _norm(WIDTHS[0])}
    for stage, width in enumerate(WIDTHS):
        table |= _block_layers(f"layer{stage + 1}.0.", WIDTHS[max(stage - 1, 0)], width, faults)
    return {**table, "fc": Layer("dense", WIDTHS[-1], CLASSES)}


def _norm(width):
    return Layer("norm", width, width)


def _block_layers(prefix, inputs, width, faults) -> dict[str, Layer]:
    strides = (2, 1) if inputs < width else (1, 1)
    if faults.get(f"{prefix}conv1") == "stride in the next":
        strides = strides[::-1]
    table = {
        "conv1": Layer("conv", inputs, width, 3, strides[0]), "bn1": _norm(width),
        "conv2": Layer("conv", width, width, 3, strides[1]), "bn2": _norm(width),
    }  # fmt: skip
    if inputs < width:
        table["downsample.0"] = Layer("conv", inputs, width, 1, 2)
        table["downsample.1"] = _norm(width)
    return {prefix + name: layer for name, layer in table.items()}


def key():
    """A random key whose generator compiles in a moment."""
    return jax.random.key(0, impl="unsafe_rbg")


def eligible(activation: str = "relu", stem: int = 3) -> list[tuple[str, str]]:
    """Every (layer, fault): each fault in each layer that can have it."""
    found = [(name, fault) for name in ("maxpool", "avgpool") for fault in FAULTS[name]]
    blocks = [f"layer{stage + 1}.0." for stage in range(len(WIDTHS))]
    found += [(f"{block}add", fault) for block in blocks for fault in FAULTS["add"]]
    acts = ["act1", *(block + name for block in blocks for name in ("act1", "act2"))]
    found += [(name, fault) for name in acts for fault in FAULTS[activation]]
    table = layers({}, stem)
    return found + [
        (name, fault)
        for name, layer in table.items()
        for fault in FAULTS[layer.kind]
        if layer.kind != "conv" or _can_have(name, layer, fault)
    ]


def _can_have(name, layer, fault) -> bool:
    strided = layer.stride > 1
    needs = {"SAME padding": strided, "stride in the next": strided and name != "conv1"}
    return layer.kernel > 1 and needs.get(fault, True)


def resnet(layer, x):
    """The structure; `layer(name, *values)` applies the layer of that name."""
    x = layer("maxpool", layer("act1", layer("bn1", layer("conv1", x))))
    for stage in range(len(WIDTHS)):
        x = _block(layer, f"layer{stage + 1}.0.", x, projects=stage > 0)
    return layer("fc", layer("avgpool", x))


def _block(layer, prefix, x, projects):
    y = layer(prefix + "act1", layer(prefix + "bn1", layer(prefix + "conv1", x)))
    y = layer(prefix + "bn2", layer(prefix + "conv2", y))
    if projects:
        x = layer(prefix + "downsample.1", layer(prefix + "downsample.0", x))
    return layer(prefix + "act2", layer(prefix + "add", x, y))


def padding(layer: Layer, fault):
    """Returns a convolution's `padding` in the words of flax and Haiku."""
    return "SAME" if fault == "SAME padding" else [(layer.kernel // 2,) * 2] * 2


def turned(kernel, fault, height: int = 0, width: int = 1):
    """A kernel as a faulty layer uses it; its height and width are the axes given."""
    if fault == "rotated kernel":
        return jnp.flip(kernel, (height, width))
    return jnp.swapaxes(kernel, height, width) if fault == "transposed kernel" else kernel


def convolve(fault):
    """flax's `conv_general_dilated` of a layer."""
    return lambda x, kernel, *args, **settings: jax.lax.conv_general_dilated(
        x, turned(kernel, fault), *args, **settings
    )


POOL_PADDING = {None: [(1, 1), (1, 1)], "SAME padding": "SAME", "no padding": "VALID"}
"""The max-pool's fault -> its padding."""


def batch_norm(x, weight, bias, mean, var, *, train, fault, average, count):
    """PyTorch's BatchNorm -> (output, running mean after, running variance after).

    Args:
      average: takes the mean over batch and pixels.
      count: number of values in such a mean.
    """
    forced = {"running statistics in training": False, "batch statistics in evaluation": True}
    uses_batch = forced.get(fault, train)
    decay = 0.99 if fault == "decay 0.99" else 0.9
    center, spread = mean, var
    if uses_batch:
        center = average(x)
        spread = average(jnp.square(x - center))
    eps = 1e-3 if fault == "eps 1e-3" else 1e-5
    y = (x - center) / jnp.sqrt(spread + eps) * weight + bias
    if uses_batch and train:
        factor = 1.0 if fault == "biased variance" else count / (count - 1)
        mean = decay * mean + (1 - decay) * center
        var = decay * var + (1 - decay) * spread * factor
    return y, mean, var


def without_weights(name, fault, activation, *values):
    """Activation, addition and global pool of [B, H, W, C] or of Equinox's [C, H, W]."""
    kind = name.rpartition(".")[2]
    if kind.startswith("act"):
        return _act(values[0], activation, fault)
    if kind == "add":
        return _add(*values, fault)
    return _global_pool(values[0], fault)


def _global_pool(x, fault):
    if fault == "maximum":
        return x.max((1, 2))
    if fault == "padding counted":
        x = jnp.pad(x, [(1, 1) if axis in (1, 2) else (0, 0) for axis in range(x.ndim)])
    return x.mean((1, 2))


def _act(x, activation, fault):
    if fault == "missing":
        return x
    if activation == "gelu":
        return jax.nn.gelu(x, approximate=fault == "tanh")
    return jax.nn.leaky_relu(x) if fault == "leaky" else jax.nn.relu(x)


def _add(x, y, fault):
    if fault == "stopped gradient":
        y = jax.lax.stop_gradient(y)
    return x + (jax.nn.relu(y) if fault == "ReLU before" else y)
