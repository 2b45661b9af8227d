"""The ResNet in Flax Linen."""

from flax import linen as nn

from equivalence_tests.mutants import foreign_networks as common


class Norm(nn.Module):
    fault: str | None

    @nn.compact
    def __call__(self, x, train):
        width = x.shape[-1:]
        weight = self.param("weight", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.variable("batch_stats", "running_mean", nn.initializers.zeros, None, width)
        var = self.variable("batch_stats", "running_var", nn.initializers.ones, None, width)
        y, after_mean, after_var = common.batch_norm(
            x, weight, bias, mean.value, var.value, train=train, fault=self.fault,
            average=lambda v: v.mean((0, 1, 2)), count=x.size // x.shape[-1],
        )  # fmt: skip
        if not self.is_initializing():
            mean.value, var.value = after_mean, after_var
        return y


def _layer(layer: common.Layer, name, fault, x, train):
    name = name.replace(".", "_")
    if layer.kind == "norm":
        return Norm(fault, name=name)(x, train)
    if layer.kind == "dense":
        return nn.Dense(layer.outputs, use_bias=fault != "no bias", name=name)(x)
    conv = nn.Conv(
        layer.outputs, (layer.kernel,) * 2, layer.stride, use_bias=False, name=name,
        padding=common.padding(layer, fault), conv_general_dilated=common.convolve(fault),
    )  # fmt: skip
    return conv(x)


class Net(nn.Module):
    faults: dict[str, str]
    activation: str = "relu"
    stem: int = 3

    @nn.compact
    def __call__(self, x, train: bool):
        table = common.layers(self.faults, self.stem)

        def layer(name, *values):
            fault = self.faults.get(name)
            if name in table:
                return _layer(table[name], name, fault, *values, train)
            if name == "maxpool":
                return nn.max_pool(*values, (3, 3), (2, 2), common.POOL_PADDING[fault])
            return common.without_weights(name, fault, self.activation, *values)

        return common.resnet(layer, x)
