"""Digits that gradients lose when devices sum them in float32 or in bfloat16.

    python -m equivalence_tests.studies.gradient_sums    # results/gradient-sums.json

Each of up to 1,024 simulated devices has the gradients of its own images, those of a ResNet-20 on
digits. A ring adds one device after the other and rounds every partial sum to the type of the
exchange; a tree adds pairs. The truth is the sum of the same gradients in float64.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equivalence_tests import results
from equivalence_tests.parity.tolerances import relative_error
from flax_resnet import create_model
from flax_resnet.config import DataConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.training import losses

DEVICES = (8, 64, 256, 1024)
IMAGES = 16
"""Images of a device."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def gradients_of_devices() -> list[np.ndarray]:
    """Gradients of every convolution, float32 `[D, ...]`, each device with its own images."""
    model = create_model("resnet20", in_channels=1, kernels="library")
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    train = open_dataset(DataConfig(dataset="digits")).train
    images = np.stack([train[i] for i in range(len(train))]).astype(np.float32) / 255
    labels = np.asarray(train.labels, np.int32)
    rng = np.random.default_rng(0)

    @jax.jit
    @jax.grad
    def gradients(parameters, images, labels):
        logits = nnx.merge(graph, parameters, rest, copy=True)(images)
        return losses.cross_entropy(logits, losses.soft_targets(labels, 10, 0.1)).mean()

    found = []
    for _ in range(DEVICES[-1]):
        rows = rng.choice(len(labels), IMAGES, replace=False)
        tree = gradients(parameters, images[rows], labels[rows])
        found.append([np.asarray(g) for g in jax.tree.leaves(tree) if g.ndim == 4])
    return [np.stack(each) for each in zip(*found, strict=True)]


@partial(jax.jit, static_argnums=1)
def ring(each, dtype):
    """The sum over the first axis, one after the other, every partial sum rounded."""
    narrow = each.astype(dtype)
    return jax.lax.scan(lambda total, own: (total + own, None), narrow[0], narrow[1:])[0]


def tree(each, dtype):
    """The sum over the first axis in pairs, every partial sum rounded: inside one program XLA would
    not round those between."""
    sums = each.astype(dtype)
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


WAYS = {"ring": ring, "tree": tree}


def row(gradients: list[np.ndarray], devices: int, way: str, dtype: str) -> dict:
    """Relative errors of the sums of all convolutions' gradients."""
    errors = []
    for each in gradients:
        own = each[:devices]
        got = WAYS[way](jnp.asarray(own), DTYPES[dtype])
        errors.append(relative_error(np.asarray(got, np.float64), own.sum(0, dtype=np.float64)))
    return {
        "devices": devices,
        "way": way,
        "dtype": dtype,
        "median_error": float(np.median(errors)),
        "largest_error": max(errors),
    }


def main():
    gradients = gradients_of_devices()
    rows = [
        row(gradients, devices, way, dtype)
        for devices in DEVICES
        for way in WAYS
        for dtype in DTYPES
    ]
    results.write("gradient-sums", {"images_a_device": IMAGES, "rows": rows})
    for each in rows:
        print(each)


if __name__ == "__main__":
    sys.exit(main())
