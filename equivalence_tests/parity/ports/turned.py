"""Compares two networks on images whose height and width are exchanged.

At one height and width, each axis of a strided layer sees one of the two kinds of sizes that a
wrong padding needs to show.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from torch import nn

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports import exported, jaxpr
from equivalence_tests.parity.ports.adapters import Network
from equivalence_tests.parity.ports.walk import Walk
from flax_resnet.errors import InputError


def error(network: Network, net: nn.Module, walk: Walk, images: np.ndarray) -> float | None:
    """The relative difference of the logits in evaluation.

    Args:
      walk: in evaluation mode, at its end.
      images: `[B, H, W, C]`, which are turned.

    Returns:
      None if H is W, or if a network raises on other sizes than these.
    """
    turned = images.swapaxes(1, 2)
    batch, height, width, channels = turned.shape
    # A network of one size may take its turned images for others.
    if height == width or not takes(network, images.shape, (height + 1, width + 1)):
        return None
    shape, classes = (batch, channels, height, width), [network.classes]
    try:
        standard = exported.graph(net, shape, train=False, classes=classes)
        subject = jaxpr.graph(network, turned.shape, train=False)
    except InputError:
        return None
    found = Walk(standard, subject, walk.state, walk.leaves, turned)
    got = np.asarray(found.in_jax(subject.logits))
    return tolerances.relative_error(got, found.in_torch(standard.logits))


def takes(network: Network, image_shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """True if JAX's network does not raise on images of the size (H, W).

    Args:
      image_shape: (B, H, W, C) of images that it takes.
    """
    images = jax.ShapeDtypeStruct((image_shape[0], *size, image_shape[-1]), jnp.float64)
    try:
        jax.eval_shape(partial(network.apply, train=False), network.variables, images)
    except InputError:
        return False
    return True
