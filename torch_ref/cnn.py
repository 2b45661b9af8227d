"""A plain convolutional net, the baseline of the ResNets. Images are [B, C, H, W]."""

import torch
from torch import Tensor, nn

from flax_resnet.errors import InputError


class BasicCNN(nn.Module):
    """Three 3x3 convolutions, each with ReLU and 2x2 max-pool, then two linear layers.

    Images of any size from 8 x 8; the adaptive pool does nothing at 64 x 64.
    """

    def __init__(self, num_classes=10, *, in_channels=3, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AdaptiveAvgPool2d((8, 8))
        self.fc1 = nn.Linear(128 * 8 * 8, 128)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 8:
            height, width = images.shape[-2:]
            raise InputError(f"basic_cnn needs images of at least 8 x 8, got {height} x {width}")
        x = self.maxpool(self.relu(self.conv1(images)))
        x = self.maxpool(self.relu(self.conv2(x)))
        x = self.maxpool(self.relu(self.conv3(x)))
        x = torch.flatten(self.avgpool(x), 1)  # [B, 8192]
        return self.fc(self.dropout(self.relu(self.fc1(x))))  # [B, K]
