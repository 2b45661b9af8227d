"""The ResNet in Flax NNX."""

import jax.numpy as jnp
from flax import nnx

from equivalence_tests.mutants import foreign_networks as common


class Norm(nnx.Module):
    def __init__(self, width: int, fault: str | None):
        self.weight, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.running_mean = nnx.BatchStat(jnp.zeros(width))
        self.running_var = nnx.BatchStat(jnp.ones(width))
        self.fault = fault
        self.use_running_average = False

    def __call__(self, x):
        y, self.running_mean[...], self.running_var[...] = common.batch_norm(
            x, self.weight[...], self.bias[...], self.running_mean[...], self.running_var[...],
            train=not self.use_running_average, fault=self.fault,
            average=lambda v: v.mean((0, 1, 2)), count=x.size // x.shape[-1],
        )  # fmt: skip
        return y


def _layer(layer: common.Layer, fault, rngs):
    if layer.kind == "norm":
        return Norm(layer.outputs, fault)
    if layer.kind == "dense":
        return nnx.Linear(layer.inputs, layer.outputs, use_bias=fault != "no bias", rngs=rngs)
    return nnx.Conv(
        layer.inputs, layer.outputs, (layer.kernel,) * 2, layer.stride, use_bias=False, rngs=rngs,
        padding=common.padding(layer, fault), conv_general_dilated=common.convolve(fault),
    )  # fmt: skip


class Net(nnx.Module):
    def __init__(self, faults: dict[str, str], activation: str = "relu", stem: int = 3):
        rngs = nnx.Rngs(common.key())
        table = common.layers(faults, stem)
        self.layers = nnx.Dict({n: _layer(of, faults.get(n), rngs) for n, of in table.items()})
        self.faults, self.activation = nnx.static(tuple(faults.items())), activation

    def __call__(self, x):
        faults = dict(self.faults)

        def layer(name, *values):
            if name in self.layers:
                return self.layers[name](*values)
            fault = faults.get(name)
            if name == "maxpool":
                return nnx.max_pool(*values, (3, 3), (2, 2), common.POOL_PADDING[fault])
            return common.without_weights(name, fault, self.activation, *values)

        return common.resnet(layer, x)
