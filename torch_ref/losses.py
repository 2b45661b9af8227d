"""Cross-entropy and the L1 penalty; logits are [B, K]."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the batch, in float32 or wider; targets are classes [B] or, after mixup,
    probabilities [B, K]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def l1_penalty(parameters: Iterable[Tensor], factor: float) -> Tensor:
    """factor * sum |p|"""
    return factor * sum(p.abs().sum() for p in parameters)
