"""Bytes that a training step moves on one H100, as compiled, kept under the name of a variant.

    python -m equivalence_tests.studies.step_bytes "statistics in one pass"

Run it at a revision to measure that revision. Adds rows to results/step-bytes.json; nothing runs on
a GPU.
"""

import argparse

from equivalence_tests import results
from flax_resnet import machine
from flax_resnet.commands import cli, plan
from flax_resnet.config import TrainConfig
from flax_resnet.devices import targets
from flax_resnet.training import ahead

NAME = "step-bytes"
NETWORKS = {
    "ResNet-18, 3x3 stem, 32 px, 1,024 images": ("resnet18", "cifar", 10, 32, 1024),
    "ResNet-50, 224 px, 256 images": ("resnet50", "imagenet", 1000, 224, 256),
}
"""{title: (arch, stem, classes, pixels, images)}."""


def step_of(
    arch: str, stem: str | None, classes: int, size: int, images: int, dtype: str = "bfloat16"
) -> tuple[TrainConfig, ahead.Data]:
    """The config and the data of a step without augmentation, whose batches bring their images."""
    model = {"arch": arch, "stem": stem, "num_classes": classes, "dtype": dtype}
    config = {"batch_size": images, "eval_batch_size": images, "model": model}
    config |= {"augment": {"random_crop": 0}, "data": {"image_size": size}}
    return cli.merge(TrainConfig(), config), ahead.Data((size, size, 3), resident=0)


def row(*network) -> dict:
    """Compile a step in bfloat16 and count the bytes of its kernels."""
    config, data = step_of(*network)
    made = ahead.Plan(config, data, targets.parse("h100")).compile()
    return {
        "bytes": made.bytes,
        "floor": plan.floor_bytes(config, data, num_devices=1),
        "temporary_bytes": made.temporary_bytes,
        "kernels": len(made.kernels),
        "revision": machine.revision(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", help="what the revision, or a change to it, does otherwise")
    variant = parser.parse_args().variant
    try:
        rows = results.read(NAME)["rows"]
    except FileNotFoundError:
        rows = {}
    for title, network in NETWORKS.items():
        rows.setdefault(title, {})[variant] = row(*network)
        results.write(NAME, {"rows": rows})


if __name__ == "__main__":
    main()
