"""One process of a PyTorch training under DistributedDataParallel over Gloo, on a CPU in float64.

    python -m equivalence_tests.numerics.ddp FOLDER PROCESS PROCESSES SEED

It trains on its rows of `case()` twice: with plain BatchNorm, whose statistics are those of the
process, and with the statistics of all processes. Each trace goes to FOLDER/KIND-PROCESS.npz.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from equivalence_tests.parity import inputs, torch_side

KINDS = ("own", "all")
"""BatchNorm takes the statistics of its own process, or of all processes."""


def case(**options) -> inputs.Case:
    """Five steps of ResNet-20 on eight images."""
    return inputs.make_case("resnet20", batch=8, steps=5, **options)


class OfAllProcesses(nn.BatchNorm2d):
    """BatchNorm with mean, variance and n of the batch of all processes, as nn.SyncBatchNorm has.

    nn.SyncBatchNorm refuses the tensors of a CPU. The gradient passes through both all-reduces."""

    def forward(self, x):
        """`[B, C, H, W]` -> the same shape."""
        count = dist.get_world_size() * x.numel() // x.shape[1]
        mean = all_reduce(x.sum((0, 2, 3), keepdim=True)) / count
        var = all_reduce((x - mean).square().sum((0, 2, 3), keepdim=True)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale, shift = self.weight[:, None, None], self.bias[:, None, None]
        return (x - mean) / (var + self.eps).sqrt() * scale + shift


def make_model(whole: inputs.Case, kind: str) -> nn.Module:
    """The network, under DistributedDataParallel, whose processes keep their own buffers."""
    model = torch_side.make_model(whole)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and kind == "all":
            module.__class__ = OfAllProcesses
    return DistributedDataParallel(model, broadcast_buffers=False)


def main(folder, process, processes, seed):
    torch.set_num_threads(1)
    inputs.SEED, process, processes = int(seed), int(process), int(processes)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes
    )
    whole = case()
    rows = np.arange(whole.labels.shape[1]).reshape(processes, -1)[process]
    own = dataclasses.replace(whole, images=whole.images[:, rows], labels=whole.labels[:, rows])
    for kind in KINDS:
        trace = torch_side.run(own, model=make_model(whole, kind))
        named = {
            f"{phase} {name.removeprefix('module.')}": array
            for phase, arrays in trace.items()
            for name, array in arrays.items()
        }
        np.savez(Path(folder, f"{kind}-{process}.npz"), **named)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
