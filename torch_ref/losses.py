"""Cross-entropy and the L1 penalty; logits are [B, K]."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from flax_resnet.config import OptimizerConfig


def training_loss(
    logits: Tensor, targets: Tensor, config: OptimizerConfig, class_weights: Tensor | None = None
) -> Tensor:
    """Mean loss that the config asks for; targets are classes [B] or probabilities [B, K]."""
    smoothing = config.label_smoothing
    if config.loss == "bce":
        return binary_cross_entropy(logits, targets, smoothing, config.bce_threshold)
    return cross_entropy(logits, targets, label_smoothing=smoothing, class_weights=class_weights)


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float, threshold: float | None
) -> Tensor:
    """timm's BinaryCrossEntropy, smoothed as timm's mixup does: mean over batch and classes."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    if threshold is not None:
        targets = targets.gt(threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Mean over the batch, in float32 or wider; targets are classes [B] or, after mixup,
    probabilities [B, K]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    weight = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(logits, targets, weight=weight, label_smoothing=label_smoothing)


def l1_penalty(parameters: Iterable[Tensor], factor: float) -> Tensor:
    """factor * sum |p|"""
    return factor * sum(p.abs().sum() for p in parameters)
