"""Replay of random and discrete choices: dropout masks, signs in ReLU, positions in max-pool.

A ReLU whose input is within rounding of 0 may pass it in one framework and not in the other. One
such flip in two million elements moves float32 gradients by 4e-3, a thousand times their rounding.
So torch's decisions are recorded and replayed, and only arithmetic is compared.
"""

import contextlib
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from flax_resnet.models import layers

Decisions = list[np.ndarray]
"""One array per call, in order. ReLU: bool [B, C, H, W] or [B, F], True for positive inputs.
Max-pool: int [B, C, H', W'], the flat index of each maximum in its H x W plane."""


@contextlib.contextmanager
def recorded_torch():
    """Yields the list to which torch's modules append their decisions."""
    decisions = []

    def relu(self, x):
        decisions.append((x > 0).numpy())
        return F.relu(x)

    def max_pool(self, x):
        out, indices = F.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, return_indices=True
        )
        decisions.append(indices.numpy())
        return out

    with _torch_modules(relu, max_pool):
        yield decisions


def replayed_torch(decisions: Decisions):
    """Within this context torch's ReLU and max-pool decide as recorded."""
    queue = iter(decisions)

    def relu(self, x):
        return torch.where(torch.from_numpy(next(queue)), x, torch.zeros((), dtype=x.dtype))

    def max_pool(self, x):
        indices = torch.from_numpy(next(queue))
        return x.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)

    return _torch_modules(relu, max_pool)


def _torch_modules(relu, max_pool):
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(nn.ReLU, "forward", relu))
    stack.enter_context(mock.patch.object(nn.MaxPool2d, "forward", max_pool))
    return stack


def replayed_jax(decisions):
    """Within this context flax_resnet's ReLU and max-pool decide as `channels_last(decisions)`."""
    queue = iter(decisions)

    def relu(x):
        return jnp.where(next(queue), x, jnp.zeros((), x.dtype))

    def max_pool(x, *args, **kwargs):
        indices = next(queue)  # [B, H', W', C]
        batch, _, _, channels = x.shape
        flat = indices.reshape(batch, -1, channels)
        return jnp.take_along_axis(x.reshape(batch, -1, channels), flat, 1).reshape(indices.shape)

    return mock.patch.multiple(layers, relu=relu, relu_of_sum=relu, max_pool=max_pool)


def channels_last(decisions: Decisions) -> Decisions:
    """Decisions in flax_resnet's layout: [B, C, H, W] -> [B, H, W, C]."""
    return [d.transpose(0, 2, 3, 1) if d.ndim == 4 else d for d in decisions]


def masked_torch(mask: np.ndarray | None):
    """Within this context torch's dropout keeps the features where the mask [B, F] is True."""
    if mask is None:
        return contextlib.nullcontext()

    def dropout(self, x):
        return x * torch.from_numpy(mask) / (1 - self.p) if self.training else x

    return mock.patch.object(nn.Dropout, "forward", dropout)


def masked_jax(mask):
    """Within this context flax_resnet's dropout uses the mask [B, F]."""
    if mask is None:
        return contextlib.nullcontext()
    return mock.patch.object(layers, "keep_mask", lambda keys, probability, shape: mask)
