"""A network as a pure function of its variables, and the preprocessing of its images."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Variables(NamedTuple):
    """Parameters and statistics of a forward pass."""

    params: dict
    frozen: dict
    batch_stats: dict


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Channel statistics of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_unit(self, images, dtype=jnp.float32):
        """uint8 `[B, H, W, C]` -> [0, 1]."""
        return images.astype(dtype) / 255

    def normalize(self, images):
        """[0, 1] -> mean 0, standard deviation 1 per channel; same shape."""
        mean = jnp.asarray(self.mean, images.dtype).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.std, images.dtype).reshape(1, 1, 1, -1)
        return (images - mean) / std


class Network:
    """A model taken apart into its static graph and `Variables`, put together inside a step."""

    def __init__(self, model: nnx.Module, *, freeze_backbone=False):
        self.freeze_backbone = freeze_backbone
        trained = nnx.All(nnx.Param, nnx.PathContains("fc")) if freeze_backbone else nnx.Param
        graphdef, params, frozen, stats, rest = nnx.split(
            model, trained, nnx.Param, nnx.BatchStat, ...
        )
        self._graphdef, self._rest = graphdef, rest
        self.initial = Variables(*map(nnx.to_pure_dict, (params, frozen, stats)))

    def apply(self, variables: Variables, images, *, train: bool, dropout_keys=None):
        """Images `[B, H, W, C]` -> (logits `[B, K]`, new batch_stats)."""
        model = self._merge(variables)
        model.set_attributes(deterministic=not train, raise_if_not_found=False)
        running = not train or self.freeze_backbone
        model.set_attributes(use_running_average=running, raise_if_not_found=False)
        logits = model(images, dropout_keys=dropout_keys)
        return logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def to_model(self, variables: Variables) -> nnx.Module:
        """A model in evaluation mode with these variables."""
        model = self._merge(variables)
        model.eval()
        return model

    def _merge(self, variables):
        return nnx.merge(self._graphdef, *variables, self._rest, copy=True)


def predict_logits(network: Network, preprocess: Preprocess, variables: Variables, images):
    """uint8 `[B, H, W, C]` -> logits `[B, K]` in evaluation mode, float32 or wider."""
    images = preprocess.to_unit(images, dtype_of((variables.batch_stats, variables.params)))
    logits, _ = network.apply(variables, preprocess.normalize(images), train=False)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def dtype_of(tree):
    """The floating-point type of a tree of arrays: that of its first such leaf."""
    floats = [x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return floats[0]
