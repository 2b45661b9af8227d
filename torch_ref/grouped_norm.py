"""BatchNorm whose statistics in training are those of groups of consecutive images.

This is what DistributedDataParallel computes with plain BatchNorm, each process one group, if the
buffers of the processes are averaged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d for each group by itself; running statistics are the mean over the groups."""

    def __init__(self, num_features: int, group_size: int):
        super().__init__(num_features)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape; in training `group_size` divides B."""
        if not self.training:
            return super().forward(x)
        outputs, means, variances = [], [], []
        for group in x.unflatten(0, (-1, self.group_size)):
            mean, var = self.running_mean.clone(), self.running_var.clone()
            scale, shift = self.weight, self.bias
            outputs.append(
                F.batch_norm(group, mean, var, scale, shift, True, self.momentum, self.eps)
            )
            means.append(mean)
            variances.append(var)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        self.num_batches_tracked += 1
        return torch.cat(outputs)


def in_groups(model: nn.Module, group_size: int) -> nn.Module:
    """The model with a `GroupedBatchNorm2d` in place of every nn.BatchNorm2d."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                grouped = GroupedBatchNorm2d(norm.num_features, group_size)
                grouped.load_state_dict(norm.state_dict(), assign=True)
                setattr(parent, name, grouped)
    return model
