"""Other ways to compute a training step, and the bytes and the memory of each on one H100.

    python -m equivalence_tests.studies.step_tries    # 5 minutes; results/step-tries.json

Nothing runs on a GPU.
"""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from equivalence_tests import results
from equivalence_tests.studies import step_bytes
from flax_resnet.devices import targets
from flax_resnet.models import layers, resnet
from flax_resnet.training import ahead

NAME = "step-tries"
CONVOLUTION = layers.Conv.__call__


def summed_at_once(*arrays, kernels="auto"):
    return jnp.stack([array.sum(tuple(range(array.ndim - 1))) for array in arrays])


def library_pool(x, window, stride, *, padding=0, kernels="auto"):
    return nnx.max_pool(x, (window, window), (stride, stride), [(padding, padding)] * 2)


def space_to_depth(convolution: layers.Conv, x):
    """A 7x7 convolution of stride 2 as one of 4x4 on blocks of 2x2 pixels, whose 12 numbers are
    channels; the kernel has a row and a column of zeros more."""
    if convolution.kernel_size != (7, 7):
        return CONVOLUTION(convolution, x)
    batch, height, width, channels = x.shape
    kernel = jnp.pad(convolution.kernel[...], ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
    blocks = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    dtype = convolution.dtype or x.dtype
    with jax.named_scope(convolution.layer_name):
        return lax.conv_general_dilated(
            blocks.reshape(batch, height // 2, width // 2, 4 * channels).astype(dtype),
            kernel.reshape(4, 4, 4 * channels, -1).astype(dtype),
            (1, 1),
            [(2, 1), (2, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def named_convolution(convolution: layers.Conv, x):
    return checkpoint_name(CONVOLUTION(convolution, x), "convolution")


def kept_convolutions(network: resnet.ResNet, block, x, keys):
    """A block that is computed again but for its convolutions."""
    policy = jax.checkpoint_policies.save_only_these_names("convolution")
    return nnx.remat(type(block).__call__, policy=policy)(block, x, keys)


TRIES = {
    "as it is": [],
    "sums over images and pixels at once": [(layers, "_sums", summed_at_once)],
    "XLA's own max-pool": [(layers, "max_pool", library_pool)],
    "the 7x7 convolution on blocks of 2x2 pixels": [(layers.Conv, "__call__", space_to_depth)],
    "the ReLU of a residual sum keeps its input": [(layers, "relu_of_sum", layers.relu)],
    "`--remat`": [],
    "`--remat`, but convolutions are kept": [
        (layers.Conv, "__call__", named_convolution),
        (resnet.ResNet, "_run", kept_convolutions),
    ],
}
"""{the other way: (owner, name, what stands in its place)}"""


def compiled(network: tuple, way: str) -> ahead.Compiled:
    """The step of a network of `step_bytes`, computed in another way."""
    config, data = step_bytes.step_of(*network)
    if way == "`--remat`":
        model = dataclasses.replace(config.model, remat=True)
        config = dataclasses.replace(config, model=model)
    with contextlib.ExitStack() as stack:
        for patch in TRIES[way]:
            stack.enter_context(mock.patch.object(*patch))
        jax.clear_caches()  # drops what was traced in another way
        return ahead.Plan(config, data, targets.parse("h100")).compile()


def main():
    rows = {}
    for title, network in step_bytes.NETWORKS.items():
        for way in TRIES:
            made = compiled(network, way)
            rows.setdefault(title, {})[way] = {
                "bytes": made.bytes,
                "temporary_bytes": made.temporary_bytes,
                "flops": made.flops,
            }
            print(title, way, rows[title][way], flush=True)
    results.write(NAME, {"rows": rows})


if __name__ == "__main__":
    main()
