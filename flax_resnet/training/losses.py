"""The losses and the L1 penalty with the definitions of PyTorch and timm."""

import jax
import jax.numpy as jnp
import optax

from flax_resnet.config import OptimizerConfig


def soft_targets(labels, num_classes: int, smoothing: float, dtype=jnp.float32):
    """labels `[B]` -> `[B, K]`: 1 - s on the label plus s / K everywhere, as torch's
    `label_smoothing`."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=dtype), smoothing)


def cross_entropy(logits, targets):
    """logits and targets `[B, K]` -> losses `[B]`, in nats; computed in float32 or wider."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(logits, targets, threshold: float | None = None):
    """timm's BinaryCrossEntropy: logits and targets `[B, K]` -> losses `[B]`, means over the
    classes, in nats; computed in float32 or wider.

    Args:
      threshold: targets above it become 1, others 0; None leaves them.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if threshold is not None:
        targets = (targets > threshold).astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)


def training_loss(logits, targets, config: OptimizerConfig):
    """logits and targets `[B, K]` -> the losses `[B]` that the config asks for."""
    if config.loss == "bce":
        return binary_cross_entropy(logits, targets, config.bce_threshold)
    return cross_entropy(logits, targets)


def l1_penalty(params) -> jax.Array:
    """Sum of the absolute values of all leaves; gradient 0 at 0, as torch, where jnp.abs has 1."""
    leaves = jax.tree.leaves(params)
    return sum((leaf * jax.lax.stop_gradient(jnp.sign(leaf))).sum() for leaf in leaves)
