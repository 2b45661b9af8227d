"""Predicts the communication and the scaling efficiency of a training step on many GPUs.

    python -m equivalence_tests.benchmark.scaling  # results/scaling.json and .png

Bytes and numbers of all-reduces come from the model; `test_compiled.py` checks them in the compiled
program. Seconds come from the assumptions below; nothing here has run on a GPU.
"""

import math
import sys
from typing import NamedTuple

import jax
from flax import nnx

from equivalence_tests import results
from equivalence_tests.benchmark import charts, roofline
from flax_resnet import list_models
from flax_resnet.models import create_model
from flax_resnet.models.layers import BatchNorm

GPUS = tuple(2**n for n in range(11))
BATCH_PER_GPU = 128
GPUS_PER_HOST = 8
CEILINGS = {"flops": 989e12, "bytes": 3.35e12}  # a second
NVLINK, INFINIBAND = 450e9, 50e9  # bytes a second and GPU, in each direction
START, NVLINK_HOP, INFINIBAND_HOP = 10e-6, 2e-6, 8e-6  # seconds
FABRICS = {
    "nvlink": "NVLink between all",
    "infiniband": "InfiniBand between all",
    "hosts": f"hosts of {GPUS_PER_HOST} with NVLink, InfiniBand between",
}
ASSUMPTIONS = {
    "status": "a prediction from the model and data sheets; nothing of it was measured on GPUs",
    "scaling": f"weak: {BATCH_PER_GPU} images a GPU however many there are, bfloat16 computation,"
    " gradients and statistics exchanged in float32",
    "images": "224 pixels and 1,000 classes for torchvision's ten networks, 32 pixels and 10"
    " classes for the others",
    "gpu": "H100 SXM at its data sheet's 989 TFLOP/s (bfloat16, dense) and 3.35 TB/s: a step takes"
    " its roofline floor (roofline.py). Real steps take longer, which makes real efficiency higher",
    "nvlink": "450 GB/s a GPU and direction (NVLink 4). As a fabric of its own: all GPUs in one"
    " NVLink domain, which is built up to 8 GPUs a host and to 256 with NVLink switches",
    "infiniband": "50 GB/s a GPU and direction: one NDR 400 Gb/s adapter a GPU, no"
    " oversubscription",
    "hosts": f"hosts of {GPUS_PER_HOST} GPUs with NVLink inside and InfiniBand between them:"
    " reduce-scatter inside, all-reduce of the parts between hosts, all-gather inside",
    "all_reduce": "a ring at full bandwidth: 2 (n - 1) / n times the bytes",
    "latency_seconds": "of every all-reduce: 10e-6 to start, 2e-6 for every doubling of the GPUs"
    " over NVLink, 8e-6 over InfiniBand (assumed)",
    "overlap": "none: gradients are exchanged in one all-reduce after the backward pass, as the"
    " compiled program does; BatchNorm's sums have to be there before the next layer",
    "left_out": "reading images, evaluation, checkpoints, processes that wait for the slowest",
}


class Exchange(NamedTuple):
    """The all-reduces of one training step, on any number of devices."""

    statistics: tuple[int, ...]
    """Bytes of each all-reduce of BatchNorm: two forward and one backward per layer."""

    gradients: int
    """Bytes of the last all-reduce: the other gradients, loss and accuracy."""

    @property
    def bytes(self) -> int:
        """Bytes of all all-reduces."""
        return sum(self.statistics) + self.gradients

    @property
    def times(self) -> int:
        """Number of all-reduces."""
        return len(self.statistics) + 1


def exchange(arch: str, num_classes: int) -> Exchange:
    """The all-reduces of a network's training step, in float32.

    Each channel of a BatchNorm needs three sums forward and two backward. The forward sums take two
    all-reduces, because the second needs the result of the first. The backward sums are also the
    gradients of bias and scale.
    """
    model = nnx.eval_shape(lambda: create_model(arch, num_classes))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
    channels = [math.prod(layer.scale.shape) for layer in layers]
    statistics = tuple(4 * passes * size for size in channels for passes in (1, 2, 2))
    return Exchange(statistics, 4 * (parameters - 2 * sum(channels) + 2))


def all_reduce_seconds(size: int, gpus: int, fabric: str) -> float:
    """Seconds of an all-reduce of `size` bytes among `gpus` GPUs, by ASSUMPTIONS."""
    inside = {"nvlink": gpus, "infiniband": 1, "hosts": min(gpus, GPUS_PER_HOST)}[fabric]
    between = gpus // inside
    if gpus == 1:
        return 0.0
    latency = START + NVLINK_HOP * math.log2(inside) + INFINIBAND_HOP * math.log2(between)
    ring = 2 * (inside - 1) / inside * size / NVLINK
    return latency + ring + 2 * (between - 1) / between * size / inside / INFINIBAND


def efficiency(arch: str, image_size: int, num_classes: int) -> dict:
    """The row of a network: its all-reduces, and {fabric: efficiency for each of GPUS}."""
    layers = roofline.layers(arch, stem=None, num_classes=num_classes, image_size=image_size)
    alone = roofline.floor_seconds(layers, "train", BATCH_PER_GPU, 2, CEILINGS)
    step = exchange(arch, num_classes)

    def share(gpus, fabric):
        sizes = (*step.statistics, step.gradients)
        return alone / (alone + sum(all_reduce_seconds(size, gpus, fabric) for size in sizes))

    return {
        "arch": arch,
        "image_size": image_size,
        "num_classes": num_classes,
        "step_seconds_alone": alone,
        "all_reduces": step.times,
        "bytes": step.bytes,
        "bytes_statistics": sum(step.statistics),
        "efficiency": {
            fabric: [round(share(gpus, fabric), 4) for gpus in GPUS] for fabric in FABRICS
        },
    }


def settings(arch: str) -> tuple[int, int]:
    """Image size and number of classes of a network."""
    small = arch in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "basic_cnn")
    return (32, 10) if small else (224, 1000)


def main():
    rows = [efficiency(arch, *settings(arch)) for arch in list_models()]
    results.write("scaling", {"assumptions": ASSUMPTIONS, "gpus": GPUS, "rows": rows})
    charts.scaling(results.FOLDER / "scaling.png", GPUS, rows, FABRICS)
    for row in rows:
        last = {fabric: values[-1] for fabric, values in row["efficiency"].items()}
        print(f"{row['arch']:16} {row['all_reduces']:4} {row['bytes'] / 1e6:8.1f} MB", last)


if __name__ == "__main__":
    sys.exit(main())
