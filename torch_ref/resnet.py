"""ResNets: torchvision's ten (v1.5) and the CIFAR five of He et al. 2015 (arXiv:1512.03385, 4.2).

B batch, C channels, H height, W width. Attribute names are torchvision's. The tables below
are written here again on purpose: what a reference shares with its subject it cannot check.
"""

from functools import partial
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

conv = partial(nn.Conv2d, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride, shortcut):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(planes, planes, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut(in_planes, planes, stride)
        self.stochastic_depth = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_planes, H, W]` -> `[B, planes, H / stride, W / stride]`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.stochastic_depth(self.bn2(self.conv2(out)))
        out += self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes, planes, stride, shortcut, *, groups=1, base_width=64):
        super().__init__()
        width = planes * base_width // 64 * groups
        out_planes = planes * self.expansion
        self.conv1 = conv(in_planes, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, groups=groups)  # v1.5
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_planes, 1)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_planes, out_planes, stride)
        self.stochastic_depth = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_planes, H, W]` -> `[B, 4 * planes, H / stride, W / stride]`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.stochastic_depth(self.bn3(self.conv3(out)))
        out += self.downsample(x)
        return self.relu(out)


def projection(in_planes: int, out_planes: int, stride: int) -> nn.Module:
    """1x1 convolution and BatchNorm, named "0" and "1"; nothing where the shape stays."""
    if stride == 1 and in_planes == out_planes:
        return nn.Identity()
    return nn.Sequential(conv(in_planes, out_planes, 1, stride=stride), nn.BatchNorm2d(out_planes))


class Subsample(nn.Module):
    """Shortcut without parameters: every second pixel, new channels zero, half on each side."""

    def __init__(self, in_planes, out_planes, stride):
        super().__init__()
        self.padding = (out_planes - in_planes) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_planes, H, W]` -> `[B, out_planes, H / stride, W / stride]`."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class ResNet(nn.Module):
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
        shortcut=projection,
        dropout=0.0,
        zero_init_residual=False,
        stochastic_depth=0.0,
        **block_options,
    ):
        super().__init__()
        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = conv(in_channels, planes, size, stride=stride, padding=size // 2)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        in_planes = planes
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    block(in_planes, planes * 2**stage, stride, shortcut, **block_options)
                )
                in_planes = planes * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_stages = len(depths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_planes, num_classes)
        self._initialise(zero_init_residual)
        self._drop_branches(stochastic_depth)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> logits `[B, num_classes]`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = stage(x)
        x = self.avgpool(x).flatten(1)
        return self.fc(self.dropout(x))

    def stages(self) -> list[nn.Sequential]:
        """layer1, layer2, ... in order."""
        return [getattr(self, f"layer{i + 1}") for i in range(self.num_stages)]

    def _drop_branches(self, rate: float) -> None:
        blocks = list(chain.from_iterable(self.stages()))
        for index, block in enumerate(blocks):
            if share := rate * index / (len(blocks) - 1):
                block.stochastic_depth = StochasticDepth(share, "row")

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in chain.from_iterable(self.stages()):
                last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
                nn.init.zeros_(last.weight)


_cifar = partial(ResNet, BasicBlock, planes=16, shortcut=Subsample, stem="cifar")

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
