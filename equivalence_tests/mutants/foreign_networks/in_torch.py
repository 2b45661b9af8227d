"""The ResNet in PyTorch, of torchvision's blocks."""

from torch import nn
from torchvision.models.resnet import BasicBlock

from equivalence_tests.mutants.foreign_networks import CLASSES, WIDTHS

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Net(nn.Module):
    def __init__(self, activation: str = "relu", stem: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], stem, 2, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.act1 = _ACTIVATIONS[activation]()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], activation)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], activation)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[2], CLASSES)

    def forward(self, x):
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs, width, activation):
    projection = None
    if inputs < width:
        conv = nn.Conv2d(inputs, width, 1, 2, bias=False)
        projection = nn.Sequential(conv, nn.BatchNorm2d(width))
    block = BasicBlock(inputs, width, 1 if projection is None else 2, projection)
    block.relu = _ACTIVATIONS[activation]()
    return nn.Sequential(block)
