"""A split -> metrics, in the precision of the run."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from torch_ref.steps import autocast, parameter_dtype, to_device


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, device: torch.device, dtype: torch.dtype) -> dict:
    """Mean loss and metrics over all images; the macro means are scikit-learn's."""
    model.eval()
    loss, labels, predicted, ranked = 0.0, [], [], []
    for images, targets in batches:
        with autocast(device, dtype):
            logits = model(to_device(images, device, dtype))
        logits = logits.to(parameter_dtype(dtype)).cpu()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        labels.append(targets)
        predicted.append(logits.argmax(1))  # of equals the first; topk has no order
        ranked.append(logits.topk(min(5, logits.shape[1])).indices)
    labels, predicted, ranked = map(torch.cat, (labels, predicted, ranked))  # [N], [N], [N, 5]
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    return {
        "loss": loss / len(labels),
        "accuracy": (predicted == labels).double().mean().item(),
        "top5_accuracy": (ranked == labels[:, None]).double().sum(1).mean().item(),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
    }
