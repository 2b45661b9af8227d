"""What the two frameworks draw or decide for themselves, made one: dropout masks, and the sides
that ReLU and max-pool take.

A ReLU whose input is within rounding of 0 may open in one framework and stay shut in the other.
One such flip in two million moves float32 gradients by 4e-3, a thousand times their rounding. So
torch's decisions are recorded and replayed, and what is left to compare is arithmetic.
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
"""In the order of the calls: of a ReLU, bool [B, C, H, W] or [B, F], where it is open; of a
max-pool, int [B, C, H', W'], the flat place of each maximum in its H x W plane."""


@contextlib.contextmanager
def recorded_torch():
    """Yields the list that the decisions of torch's modules go into."""
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

    return mock.patch.multiple(layers, relu=relu, max_pool=max_pool)


def channels_last(decisions: Decisions) -> Decisions:
    """As flax_resnet sees them: [B, C, H, W] -> [B, H, W, C]."""
    return [d.transpose(0, 2, 3, 1) if d.ndim == 4 else d for d in decisions]


def masked_torch(mask: np.ndarray | None):
    """torch's dropout keeps what the mask [B, F] says."""
    if mask is None:
        return contextlib.nullcontext()

    def dropout(self, x):
        return x * torch.from_numpy(mask) / (1 - self.p) if self.training else x

    return mock.patch.object(nn.Dropout, "forward", dropout)


def masked_jax(mask):
    """flax_resnet's dropout keeps what the mask [B, F] says."""
    if mask is None:
        return contextlib.nullcontext()
    return mock.patch.object(layers, "keep_mask", lambda keys, probability, shape: mask)
