"""Small networks that are no ResNets of torchvision, in Flax NNX; `pairs_torch` has the same."""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from equivalence_tests.mutants.foreign_networks.in_nnx import Norm

CLASSES = 5


def _conv(inputs, outputs, kernel, strides=1, padding=0, rngs=None, **settings):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = (padding, padding) if isinstance(padding, int) else padding
    pads = [(p, p) for p in pads]
    return nnx.Conv(inputs, outputs, kernel, strides, padding=pads, rngs=rngs, **settings)


class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = _conv(3, 8, 3, padding=1, rngs=rngs)
        self.conv2 = _conv(8, 12, (5, 3), 2, (2, 1), rngs=rngs)
        self.fc1 = nnx.Linear(12, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.tanh(self.conv2(x)), (3, 3), (1, 1), [(1, 1), (1, 1)])
        return self.fc2(nnx.relu(self.fc1(x.mean((1, 2)))))


class GroupNormBlock(nnx.Module):
    def __init__(self, inputs, width, rngs):
        norm = partial(nnx.GroupNorm, width, 4, epsilon=1e-5, rngs=rngs)
        self.conv1 = _conv(inputs, width, 3, 2, 1, rngs, use_bias=False)
        self.norm1 = norm()
        self.conv2 = _conv(width, width, 3, 1, 1, rngs, use_bias=False)
        self.norm2 = norm()
        self.projection = _conv(inputs, width, 1, 2, 0, rngs, use_bias=False)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.projection(x))


class GroupNormNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = _conv(3, 8, 3, 1, 1, rngs, use_bias=False)
        self.norm = nnx.GroupNorm(8, 2, epsilon=1e-5, rngs=rngs)
        self.blocks = nnx.List([GroupNormBlock(8, 16, rngs), GroupNormBlock(16, 24, rngs)])
        self.fc = nnx.Linear(24, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class DepthwiseNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = _conv(3, 12, 3, 2, 1, rngs)
        self.depthwise = _conv(
            12, 12, 3, 1, 2, rngs, kernel_dilation=2, feature_group_count=12
        )  # fmt: skip
        self.norm = Norm(12, None)
        self.pointwise = _conv(12, 24, 1, rngs=rngs)
        self.grouped = _conv(24, 18, 3, 2, 1, rngs, feature_group_count=3)
        self.fc = nnx.Linear(18, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu6(self.norm(self.depthwise(self.stem(x))))
        x = nnx.silu(self.grouped(nnx.hard_swish(self.pointwise(x))))
        return self.fc(x.mean((1, 2)))


class VitBlock(nnx.Module):
    def __init__(self, width, heads, attention, rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        settings = {"decode": False, "attention_fn": attention, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(heads, width, **settings)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(width, 2 * width, rngs=rngs)
        self.fc2 = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class Vit(nnx.Module):
    """NNX's own attention takes the softmax in float32, whatever the inputs are."""

    def __init__(self, rngs, width=12, heads=3, attention=nnx.dot_product_attention):
        self.patches = _conv(3, width, 4, 4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 21, width)))
        self.blocks = nnx.List([VitBlock(width, heads, attention, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.fc(self.norm(x)[:, 0])


class ConvNextBlock(nnx.Module):
    def __init__(self, width, rngs):
        self.depthwise = _conv(width, width, 7, 1, 3, rngs, feature_group_count=width)
        self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full((width,), 0.1))

    def __call__(self, x):
        y = nnx.gelu(self.fc1(self.norm(self.depthwise(x))), approximate=False)
        return x + self.layer_scale[...] * self.fc2(y)


class ConvNext(nnx.Module):
    def __init__(self, rngs):
        self.stem = _conv(3, 8, 2, 2, rngs=rngs)
        self.block1 = ConvNextBlock(8, rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-6, rngs=rngs)
        self.reduce = _conv(8, 12, 2, 2, rngs=rngs)
        self.block2 = ConvNextBlock(12, rngs)
        self.fc = nnx.Linear(12, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = self.reduce(self.norm(self.block1(self.stem(x))))
        return self.fc(self.block2(x).mean((1, 2)))


NETWORKS = {
    "cnn": Cnn, "group norm": GroupNormNet, "depthwise": DepthwiseNet, "vit": Vit,
    "convnext": ConvNext,
}  # fmt: skip
