"""Small networks that are no ResNets of torchvision, in PyTorch; `pairs_nnx` has the same."""

import torch
from torch import nn

CLASSES = 5


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 12, (5, 3), stride=2, padding=(2, 1))
        self.pool2 = nn.AvgPool2d(3, 1, padding=1)
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.pool1(torch.relu(self.conv1(x)))
        x = self.pool2(torch.tanh(self.conv2(x)))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


class GroupNormBlock(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.projection = nn.Conv2d(inputs, width, 1, 2, bias=False)

    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.projection(x))


class GroupNormNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.blocks = nn.Sequential(GroupNormBlock(8, 16), GroupNormBlock(16, 24))
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x):
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class DepthwiseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.pointwise = nn.Conv2d(12, 24, 1)
        self.grouped = nn.Conv2d(24, 18, 3, 2, 1, groups=3)
        self.fc = nn.Linear(18, CLASSES)

    def forward(self, x):
        x = nn.functional.relu6(self.norm(self.depthwise(self.stem(x))))
        x = nn.functional.silu(self.grouped(nn.functional.hardswish(self.pointwise(x))))
        return self.fc(x.mean((2, 3)))


class VitBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Takes 5 x 4 patches of 4 x 4 pixels."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 21, width))
        self.blocks = nn.Sequential(VitBlock(width, heads), VitBlock(width, heads))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.fc(self.norm(self.blocks(x))[:, 0])


class ConvNextBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class ConvNext(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.block1 = ConvNextBlock(8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.reduce = nn.Conv2d(8, 12, 2, 2)
        self.block2 = ConvNextBlock(12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = self.norm(self.block1(self.stem(x)).permute(0, 2, 3, 1))
        x = self.block2(self.reduce(x.permute(0, 3, 1, 2)))
        return self.fc(x.mean((2, 3)))


NETWORKS = {
    "cnn": Cnn, "group norm": GroupNormNet, "depthwise": DepthwiseNet, "vit": Vit,
    "convnext": ConvNext,
}  # fmt: skip
