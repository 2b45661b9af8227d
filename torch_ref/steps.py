"""One batch of training."""

import torch
from torch import Tensor, nn

from torch_ref.evaluate import autocast
from torch_ref.losses import cross_entropy, l1_penalty


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    label_smoothing: float = 0.0,
    l1: float = 0.0,
    clip_norm: float = 0.0,
    accumulate_steps: int = 1,
    step: int = 0,
) -> Tensor:
    """One batch; the last of every `accumulate_steps` updates the weights. Returns the loss
    without penalties.

    Args:
      images: [B, C, H, W].
      labels: [B], or [B, K] after mixup.
      l1: factor of the sum of absolute weights that is added to the loss.
      clip_norm: largest global gradient norm; 0 is off.
      step: number of this batch, from 0.
    """
    if step % accumulate_steps == 0:
        optimizer.zero_grad()
    with autocast(images.device, dtype):
        loss = cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    objective = loss + l1_penalty(model.parameters(), l1) if l1 else loss
    (objective / accumulate_steps).backward()
    if (step + 1) % accumulate_steps == 0:
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return loss.detach()
