"""The ResNet in Equinox: one image, [C, H, W]."""

import equinox as eqx
import jax
import jax.numpy as jnp

from equivalence_tests.mutants import foreign_networks as common


class Norm(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    statistics: eqx.nn.StateIndex
    fault: str | None
    inference: bool

    def __init__(self, width, fault):
        self.weight, self.bias = jnp.ones(width), jnp.zeros(width)
        self.statistics = eqx.nn.StateIndex((jnp.zeros(width), jnp.ones(width)))
        self.fault, self.inference = fault, False

    def __call__(self, x, state):
        vectors = self.weight, self.bias, *state.get(self.statistics)
        y, *statistics = common.batch_norm(
            x, *(vector[:, None, None] for vector in vectors),
            train=not self.inference, fault=self.fault,
            average=lambda v: jax.lax.pmean(v.mean((1, 2), keepdims=True), "batch"),
            count=jax.lax.psum(1, "batch") * x[0].size,
        )  # fmt: skip
        return y, state.set(self.statistics, tuple(v[:, 0, 0] for v in statistics))


class Conv(eqx.nn.Conv2d):
    fault: str | None

    def __init__(self, layer: common.Layer, fault, key):
        pad = "SAME" if fault == "SAME padding" else layer.kernel // 2
        sizes = layer.inputs, layer.outputs, layer.kernel, layer.stride
        super().__init__(*sizes, pad, use_bias=False, key=key)
        self.fault = fault

    def __call__(self, x):
        kernel = common.turned(self.weight, self.fault, 2, 3)
        return eqx.nn.Conv2d.__call__(eqx.tree_at(lambda conv: conv.weight, self, kernel), x)


def _layer(layer: common.Layer, fault, key):
    if layer.kind == "norm":
        return Norm(layer.outputs, fault)
    if layer.kind == "dense":
        sizes = layer.inputs, layer.outputs
        return eqx.nn.Linear(*sizes, use_bias=fault != "no bias", key=key)
    return Conv(layer, fault, key)


def _max_pool(x, fault):
    if fault == "SAME padding":
        low_high = jax.lax.padtype_to_pads(x.shape[1:], (3, 3), (2, 2), "SAME")
    else:
        low_high = [(0, 0) if fault else (1, 1)] * 2
    return eqx.nn.MaxPool2d(3, 2, low_high)(x)


class Net(eqx.Module):
    layers: dict[str, eqx.Module]
    faults: dict[str, str]
    activation: str

    def __init__(self, faults: dict[str, str], activation: str = "relu", stem: int = 3):
        table, key = common.layers(faults, stem), common.key()
        self.layers = {name: _layer(of, faults.get(name), key) for name, of in table.items()}
        self.faults, self.activation = faults, activation

    def __call__(self, x, state):
        def layer(name, *values):
            nonlocal state
            fault, own = self.faults.get(name), self.layers.get(name)
            if isinstance(own, Norm):
                y, state = own(*values, state)
                return y
            if own is not None:
                return own(*values)
            if name == "maxpool":
                return _max_pool(*values, fault)
            return common.without_weights(name, fault, self.activation, *values)

        return common.resnet(layer, x), state


def net(faults: dict[str, str], activation: str = "relu", stem: int = 3):
    return eqx.nn.make_with_state(Net)(faults, activation, stem)
