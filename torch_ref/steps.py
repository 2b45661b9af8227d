"""The training step: prepare a batch, take gradients, apply them."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flax_resnet.config import OptimizerConfig
from torch_ref.losses import l1_penalty, training_loss


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast for bfloat16; other types need none, they are those of the parameters."""
    mixed = dtype == torch.bfloat16
    return torch.autocast(device.type, dtype) if mixed else contextlib.nullcontext()


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of parameters, of a computation in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(dtype: torch.dtype) -> torch.memory_format:
    """Channels last, but for float64, whose convolutions are slower then."""
    return torch.contiguous_format if dtype == torch.float64 else torch.channels_last


def to_device(images: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The images as the network takes them; autocast does the narrowing."""
    return images.to(
        device, parameter_dtype(dtype), non_blocking=True, memory_format=memory_format(dtype)
    )


def prepare_batch(
    images: Tensor,
    labels: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch of the loader on the device; with mixup, the labels [B] become [B, K]."""
    batch = to_device(images, device, dtype), labels.to(device)
    return mix(*batch) if mix else batch


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: OptimizerConfig,
    *,
    dtype: torch.dtype = torch.float32,
    step: int = 0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Train on one batch and return its loss without penalties. The last batch of every
    `accumulate_steps` updates the weights.

    Args:
      images: [B, C, H, W].
      labels: [B], or [B, K] after mixup.
      step: number of this batch, from 0.
      class_weights: of the loss, [K].
    """
    if step % config.accumulate_steps == 0:
        optimizer.zero_grad()
    loss = loss_and_gradients(model, images, labels, config, dtype, class_weights)
    if (step + 1) % config.accumulate_steps == 0:
        apply_gradients(model, optimizer, config)
    return loss


def loss_and_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: OptimizerConfig,
    dtype: torch.dtype,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The loss without penalties; adds the gradients of the batch to those of the parameters."""
    with autocast(images.device, dtype):
        loss = training_loss(model(images), labels, config, class_weights)
    objective = loss + l1_penalty(model.parameters(), config.l1) if config.l1 else loss
    (objective / config.accumulate_steps).backward()
    return loss.detach()


def apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizerConfig
) -> None:
    """Update the weights once, from clipped gradients if the config asks for it."""
    if config.clip_norm and config.optimizer != "lamb":  # timm's LAMB clips itself
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
