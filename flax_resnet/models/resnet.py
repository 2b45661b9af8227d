"""ResNets: torchvision's ten (v1.5) and the CIFAR five of He et al. 2015 (arXiv:1512.03385, 4.2).

B batch, H height, W width, C channels. Attribute names are torchvision's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resnet.models import layers


class BasicBlock(nnx.Module):
    expansion = 1
    layer_name = ""
    stochastic_depth = None

    def __init__(self, in_planes, planes, stride, shortcut, *, conv, norm, groups, base_width):
        del groups, base_width  # bottlenecks only
        self.conv1 = conv(in_planes, planes, 3, stride=stride, padding=1)
        self.bn1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, padding=1)
        self.bn2 = norm(planes)
        self.downsample = shortcut(in_planes, planes, stride)

    def __call__(self, x, keys=None):
        """`[B, H, W, in_planes]` -> `[B, H / stride, W / stride, planes]`; `keys` is `[B]`."""
        out = layers.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stochastic_depth is not None:
            out = self.stochastic_depth(out, keys)
        return layers.relu_of_sum(out + self.downsample(x))


class Bottleneck(nnx.Module):
    expansion = 4
    layer_name = ""
    stochastic_depth = None

    def __init__(self, in_planes, planes, stride, shortcut, *, conv, norm, groups, base_width):
        width = int(planes * base_width / 64) * groups
        out_planes = planes * self.expansion
        self.conv1 = conv(in_planes, width, 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, groups=groups)  # v1.5
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_planes, 1)
        self.bn3 = norm(out_planes)
        self.downsample = shortcut(in_planes, out_planes, stride)

    def __call__(self, x, keys=None):
        """`[B, H, W, in_planes]` -> `[B, H / stride, W / stride, 4 * planes]`; `keys` is `[B]`."""
        out = layers.relu(self.bn1(self.conv1(x)))
        out = layers.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stochastic_depth is not None:
            out = self.stochastic_depth(out, keys)
        return layers.relu_of_sum(out + self.downsample(x))


class Identity(nnx.Module):
    def __call__(self, x):
        return x


class Projection(nnx.Module):
    """1x1 convolution and BatchNorm, named "0" and "1" as in torchvision's Sequential."""

    def __init__(self, in_planes, out_planes, stride, *, conv, norm):
        self.layers = nnx.List([conv(in_planes, out_planes, 1, stride=stride), norm(out_planes)])

    def __call__(self, x):
        """`[B, H, W, in_planes]` -> `[B, H / stride, W / stride, out_planes]`."""
        convolution, norm = self.layers
        return norm(convolution(x))


class Subsample(nnx.Module):
    """Shortcut without parameters: every second pixel, new channels zero, half on each side."""

    def __init__(self, new_planes, stride):
        self.padding = new_planes // 2
        self.stride = stride

    def __call__(self, x):
        """`[B, H, W, C]` -> `[B, H / stride, W / stride, C + new_planes]`."""
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.padding, self.padding)))


class ResNet(nnx.Module):
    """Stem, stages of blocks, average pool, dropout, linear layer."""

    def __init__(
        self,
        block,
        depths,
        num_classes=10,
        *,
        in_channels=3,
        stem="imagenet",
        planes=64,
        groups=1,
        base_width=64,
        projection=True,
        dropout=0.0,
        zero_init_residual=False,
        stochastic_depth=0.0,
        dtype=None,
        param_dtype=jnp.float32,
        bn_axis_name=None,
        batch_norm_images=None,
        kernels="auto",
        precision="default",
        remat=False,
        rngs,
    ):
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        conv = partial(layers.conv, kernels=kernels, precision=precision, **options)
        shared = dict(axis_name=bn_axis_name, group_size=batch_norm_images)
        norm = partial(layers.BatchNorm, kernels=kernels, **shared, **options)
        parts = dict(conv=conv, norm=norm)
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, planes, size, stride=stride, padding=size // 2)
        self.bn1 = norm(planes)
        self.pools = stem == "imagenet"
        self.kernels, self.remat = kernels, remat
        in_planes = planes
        for stage, depth in enumerate(depths):
            out_planes = planes * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    block(
                        in_planes,
                        out_planes,
                        stride,
                        partial(_shortcut, projection=projection, **parts),
                        groups=groups,
                        base_width=base_width,
                        **parts,
                    )
                )
                in_planes = out_planes * block.expansion
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.num_stages = len(depths)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.linear(in_planes, num_classes, precision=precision, **options)
        if stochastic_depth:
            self._drop_branches(stochastic_depth, rngs)
        if zero_init_residual:
            self._zero_init_residual()

    def __call__(self, x, *, dropout_keys=None):
        """`[B, H, W, C]` -> logits `[B, num_classes]`; `dropout_keys` is `[B]`."""
        x = layers.relu(self.bn1(self.conv1(x)))
        if self.pools:
            x = layers.max_pool(x, 3, 2, padding=1, kernels=self.kernels)
        for index, block in enumerate(self._blocks(), 1):
            keys = None
            if block.stochastic_depth is not None and dropout_keys is not None:
                keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, index)
            with jax.named_scope(block.layer_name or type(block).__name__):
                x = self._run(block, x, keys)
        x = layers.global_average_pool(x)
        return self.fc(self.dropout(x, dropout_keys))

    def _run(self, block, x, keys):
        """The output of a block, of which nothing is kept for the backward pass with `remat`."""
        if self.remat and not self.dropout.deterministic:
            return nnx.remat(type(block).__call__)(block, x, keys)
        return block(x, keys)

    def blocks(self):
        """All blocks in order."""
        return self._blocks()

    def _blocks(self):
        # Not public where a call goes through it: nnx.tabulate makes a row of every public method,
        # and cannot show modules in it.
        return [b for i in range(self.num_stages) for b in getattr(self, f"layer{i + 1}")]

    def _drop_branches(self, rate, rngs):
        """The first block is always kept, as in timm."""
        blocks = self.blocks()
        for index, block in enumerate(blocks[1:], 1):
            share = rate * index / (len(blocks) - 1)
            block.stochastic_depth = layers.StochasticDepth(share, rngs=rngs)

    def _zero_init_residual(self):
        for block in self.blocks():
            last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
            last.scale[...] = jnp.zeros_like(last.scale[...])


def _shortcut(in_planes, out_planes, stride, *, projection, conv, norm):
    if stride == 1 and in_planes == out_planes:
        return Identity()
    if projection:
        return Projection(in_planes, out_planes, stride, conv=conv, norm=norm)
    return Subsample(out_planes - in_planes, stride)


_cifar = partial(ResNet, BasicBlock, planes=16, projection=False, stem="cifar")

CONSTRUCTORS = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": partial(ResNet, Bottleneck, (3, 4, 6, 3), groups=32, base_width=4),
    "resnext101_32x8d": partial(ResNet, Bottleneck, (3, 4, 23, 3), groups=32, base_width=8),
    "resnext101_64x4d": partial(ResNet, Bottleneck, (3, 4, 23, 3), groups=64, base_width=4),
    "wide_resnet50_2": partial(ResNet, Bottleneck, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": partial(ResNet, Bottleneck, (3, 4, 23, 3), base_width=128),
    "resnet20": partial(_cifar, (3, 3, 3)),
    "resnet32": partial(_cifar, (5, 5, 5)),
    "resnet44": partial(_cifar, (7, 7, 7)),
    "resnet56": partial(_cifar, (9, 9, 9)),
    "resnet110": partial(_cifar, (18, 18, 18)),
}
