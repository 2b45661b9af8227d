"""ResNet-18 of Equinox's own layers at their defaults, for the survey of public networks.

No public Equinox ResNet runs on today's Equinox: eqxvision 0.2.8 imports `equinox.experimental`,
which Equinox removed.
"""

import equinox as eqx
import jax


class Block(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    bn2: eqx.nn.BatchNorm
    projection: tuple[eqx.nn.Conv2d, eqx.nn.BatchNorm] | None

    def __init__(self, inputs: int, width: int, stride: int, key):
        keys = jax.random.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(inputs, width, 3, stride, 1, use_bias=False, key=keys[0])
        self.bn1 = eqx.nn.BatchNorm(width, "batch")
        self.conv2 = eqx.nn.Conv2d(width, width, 3, 1, 1, use_bias=False, key=keys[1])
        self.bn2 = eqx.nn.BatchNorm(width, "batch")
        self.projection = None
        if inputs != width:
            conv = eqx.nn.Conv2d(inputs, width, 1, stride, use_bias=False, key=keys[2])
            self.projection = conv, eqx.nn.BatchNorm(width, "batch")

    def __call__(self, x, state):
        y, state = self.bn1(self.conv1(x), state)
        y, state = self.bn2(self.conv2(jax.nn.relu(y)), state)
        if self.projection is not None:
            conv, norm = self.projection
            x, state = norm(conv(x), state)
        return jax.nn.relu(x + y), state


class ResNet18(eqx.Module):
    conv1: eqx.nn.Conv2d
    bn1: eqx.nn.BatchNorm
    blocks: list[Block]
    fc: eqx.nn.Linear

    def __init__(self, classes: int, key):
        keys = jax.random.split(key, 10)
        self.conv1 = eqx.nn.Conv2d(3, 64, 7, 2, 3, use_bias=False, key=keys[0])
        self.bn1 = eqx.nn.BatchNorm(64, "batch")
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        sizes = [s for i, o, stride in stages for s in ((i, o, stride), (o, o, 1))]
        self.blocks = [Block(*size, key) for size, key in zip(sizes, keys[1:9], strict=True)]
        self.fc = eqx.nn.Linear(512, classes, key=keys[9])

    def __call__(self, image, state):
        """[3, H, W] -> logits [K]."""
        x, state = self.bn1(self.conv1(image), state)
        x = eqx.nn.MaxPool2d(3, 2, 1)(jax.nn.relu(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.fc(x.mean((1, 2))), state
