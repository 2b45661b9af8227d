"""A basic CNN: three convolutions with ReLU and max-pool, two dense layers.

Any image of at least 8x8 pixels: the last map is brought to 8x8, which is what it is at 64x64.
"""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from flax_resnet.errors import InputError
from flax_resnet.models import layers

POOLED_SIZE = 8
SMALLEST = 8  # pixels a side of which three pools leave one


class BasicCNN(nnx.Module):
    def __init__(
        self,
        num_classes=10,
        *,
        in_channels=3,
        dropout=0.0,
        dtype=None,
        param_dtype=jnp.float32,
        kernels="auto",
        precision="default",
        rngs,
    ):
        options = dict(dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        conv = partial(layers.conv, padding=1, bias=True, kernels=kernels, **options)
        self.conv1 = conv(in_channels, 32, 3)
        self.conv2 = conv(32, 64, 3)
        self.conv3 = conv(64, 128, 3)
        self.fc1 = layers.linear(128 * POOLED_SIZE**2, 128, **options)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.linear(128, num_classes, **options)
        self.kernels = kernels

    def __call__(self, x, *, dropout_keys=None):
        """`[B, H, W, C]` -> logits `[B, num_classes]`; `dropout_keys` is `[B]`.

        Raises:
          InputError: images of fewer than 8 pixels a side, of which the pools leave nothing.
        """
        height, width = x.shape[1:3]
        if min(height, width) < SMALLEST:
            raise InputError(
                f"basic_cnn takes images of at least {SMALLEST}x{SMALLEST} pixels, not"
                f" {height}x{width}"
            )
        for layer in (self.conv1, self.conv2, self.conv3):
            x = layers.max_pool(layers.relu(layer(x)), 2, 2, kernels=self.kernels)
        x = layers.flatten_channels_first(layers.adaptive_average_pool(x, POOLED_SIZE))
        x = layers.relu(self.fc1(x))
        return self.fc(self.dropout(x, dropout_keys))
