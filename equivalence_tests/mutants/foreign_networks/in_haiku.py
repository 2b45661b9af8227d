"""The ResNet in Haiku."""

import haiku as hk
import jax.numpy as jnp

from equivalence_tests.mutants import foreign_networks as common


class Norm(hk.Module):
    def __init__(self, fault, name):
        super().__init__(name)
        self.fault = fault

    def __call__(self, x, train):
        width = x.shape[-1:]
        weight = hk.get_parameter("weight", width, init=jnp.ones)
        bias = hk.get_parameter("bias", width, init=jnp.zeros)
        y, mean, var = common.batch_norm(
            x, weight, bias,
            hk.get_state("running_mean", width, init=jnp.zeros),
            hk.get_state("running_var", width, init=jnp.ones),
            train=train, fault=self.fault,
            average=lambda v: v.mean((0, 1, 2)), count=x.size // x.shape[-1],
        )  # fmt: skip
        hk.set_state("running_mean", mean)
        hk.set_state("running_var", var)
        return y


def _layer(layer: common.Layer, name, fault, x, train):
    name = name.replace(".", "_")
    if layer.kind == "norm":
        return Norm(fault, name)(x, train)
    if layer.kind == "dense":
        return hk.Linear(layer.outputs, with_bias=fault != "no bias", name=name)(x)
    conv = hk.Conv2D(
        layer.outputs, layer.kernel, layer.stride, with_bias=False, name=name,
        padding=common.padding(layer, fault),
    )  # fmt: skip
    with hk.custom_getter(lambda get, kernel, context: common.turned(get(kernel), fault)):
        return conv(x)


def _max_pool(x, fault):
    if fault is None:  # Haiku's pools take SAME and VALID alone
        x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-jnp.inf)
    pad = "SAME" if fault == "SAME padding" else "VALID"
    return hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), pad)


def net(faults: dict[str, str], activation: str = "relu", stem: int = 3):
    table = common.layers(faults, stem)

    def forward(x, is_training):
        def layer(name, *values):
            fault = faults.get(name)
            if name in table:
                return _layer(table[name], name, fault, *values, is_training)
            if name == "maxpool":
                return _max_pool(*values, fault)
            return common.without_weights(name, fault, activation, *values)

        return common.resnet(layer, x)

    return hk.transform_with_state(forward)
