"""Faults of layers: BatchNorm, convolutions, pools, ReLU, dropout, initialisers."""

import contextlib
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from equivalence_tests.mutants.mutant import LayerFault, Mutant
from flax_resnet import models
from flax_resnet.models import layers, resnet
from flax_resnet.weights import convert


def _becomes(**methods):
    """An edit that overrides methods of a module."""

    def edit(module):
        faulty = type(f"Faulty{type(module).__name__}", (type(module),), methods)
        object.__setattr__(module, "__class__", faulty)

    return edit


def _sets(name, value):
    return lambda module: setattr(module, name, value)


def _norm(edit, **options):
    return LayerFault(kind=layers.BatchNorm, edit=edit, **options)


_UPDATE = layers.BatchNorm._update
_STATISTICS = layers.BatchNorm._batch_statistics


def _biased(self, mean, var, count):
    _UPDATE(self, mean, var * ((count - 1) / count), count)


def _unguarded(self, x):
    count = math.prod(x.shape[:-1])
    if count > 1:
        return _STATISTICS(self, x)
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.var(axes), 2


def _fast_variance(self, x):
    axes = tuple(range(x.ndim - 1))
    mean, _, count = _STATISTICS(self, x)
    square = jnp.square(x).mean(axes)
    if self.axis_name is not None:
        square = lax.pmean(square, self.axis_name)
    return mean, square - jnp.square(mean), count


def _narrow_statistics(self, x):
    with mock.patch.object(layers, "_wide", lambda x: x):
        mean, var, count = _STATISTICS(self, x)
    return layers._wide(mean), layers._wide(var), count


def _uncounted(self, mean, var, count):
    before = self.num_batches_tracked[...]
    _UPDATE(self, mean, var, count)
    self.num_batches_tracked[...] = before


def _cumulative(self, mean, var, count):
    before = self.mean[...], self.var[...]
    _UPDATE(self, mean, var, count)
    share = 1 / (self.momentum * self.num_batches_tracked[...])
    for variable, old in zip((self.mean, self.var), before, strict=True):
        variable[...] = old + (variable[...] - old) * share.astype(old.dtype)


def _count_of_the_shard(self, x):
    mean, var, _ = _STATISTICS(self, x)
    return mean, var, math.prod(x.shape[:-1])


def _strided_groups(self, x):
    """Takes every so many-th image into a group instead of consecutive ones."""
    count = len(x) // self.group_size
    dealt = jnp.concatenate([x[first::count] for first in range(count)])
    out, *statistics = _OF_GROUPS(self, dealt)
    back = out.reshape(count, self.group_size, *x.shape[1:]).swapaxes(0, 1)
    return back.reshape(x.shape), *statistics


def _variance_over_groups(self, x):
    out, mean, _, count = _OF_GROUPS(self, x)
    return out, mean, x.var(tuple(range(x.ndim - 1))), count


def _count_of_the_batch(self, x):
    out, mean, var, count = _OF_GROUPS(self, x)
    return out, mean, var, count * (len(x) // self.group_size)


_OF_GROUPS = layers.BatchNorm._of_groups


def _conv(edit, **options):
    return LayerFault(kind=nnx.Conv, edit=edit, **options)


def _is_strided(module):
    return module.strides == 2 and module.kernel_size[0] > 1


def _transpose(module):
    module.kernel[...] = module.kernel[...].swapaxes(0, 1)


def _interleaved_groups(lhs, rhs, *args, feature_group_count=1, **kwargs):
    out = lax.conv_general_dilated(
        lhs, rhs, *args, feature_group_count=feature_group_count, **kwargs
    )
    grouped = out.reshape(*out.shape[:-1], feature_group_count, -1)
    return grouped.swapaxes(-1, -2).reshape(out.shape)


def _tf32(x):
    """Rounds operands as tensor cores do: 10 bits of mantissa, 8 of exponent."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    rounded = (bits + jnp.uint32(0xFFF) + ((bits >> 13) & jnp.uint32(1))) & jnp.uint32(0xFFFFE000)
    exact = lax.bitcast_convert_type(rounded, jnp.float32).astype(x.dtype)
    return x + lax.stop_gradient(exact - x)


def _in_tf32(lhs, rhs, *args, **kwargs):
    return lax.conv_general_dilated(_tf32(lhs), _tf32(rhs), *args, **kwargs)


def _stride_on_the_first(block):
    block.conv1.strides, block.conv2.strides = block.conv2.strides, block.conv1.strides


def _without_norm_in_narrow_nets(self, x):
    """Drops the BatchNorm of narrow projections; torchvision's have 64 channels or more."""
    convolution, norm = self.layers
    out = convolution(x)
    normalised = norm(out)
    return out if convolution.in_features < 64 else normalised


def half_at_zero(x):
    return jnp.maximum(x, 0)


def _same_max_pool(x, window, stride, **_):
    return nnx.max_pool(x, (window, window), (stride, stride), "SAME")


def _zero_padded_max_pool(x, window, stride, *, padding=0, **_):
    edge = (padding, padding)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    return nnx.max_pool(x, (window, window), (stride, stride), "VALID")


def _whole_windows(length, size):
    """Adjacent windows of ceil(length / size) pixels, as with ceil_mode."""
    window = -(-length // size)
    pixels, cells = np.arange(length), np.arange(size)[:, None]
    inside = (pixels >= cells * window) & (pixels < (cells + 1) * window)
    return inside / np.maximum(inside.sum(1, keepdims=True), 1)


def _counted_padding(length, size):
    """Divides every cell by the largest window, as if missing pixels were counted padding."""
    matrix = _POOLING_MATRIX(length, size)
    return (matrix > 0) / (matrix > 0).sum(1).max()


_POOLING_MATRIX = layers._pooling_matrix


def _flax_linear(fan_in):
    def init(key, shape, dtype=jnp.float32, **_):
        if len(shape) == 1:
            return jnp.zeros(shape, dtype)
        return nnx.initializers.lecun_normal()(key, shape, dtype)

    return init


_UNIFORM_FAN_IN = layers.uniform_fan_in


def _zero_bias(fan_in):
    def init(key, shape, dtype=jnp.float32, **options):
        drawn = _UNIFORM_FAN_IN(fan_in)(key, shape, dtype, **options)
        return jnp.zeros_like(drawn) if len(shape) == 1 else drawn

    return init


def _unscaled_dropout(self, x, keys=None):
    out = _DROPOUT(self, x, keys)
    return out if self.deterministic else out * (1 - self.rate)


def _mask_of_dropped(keys, probability, shape):
    return _KEEP_MASK(keys, 1 - probability, shape)


_DROPOUT, _KEEP_MASK = layers.Dropout.__call__, layers.keep_mask


def _branch_not_rescaled(self, x, keys=None):
    dropped = _STOCHASTIC_DEPTH(self, x, keys)
    return dropped if self.deterministic else dropped * (1 - self.rate)


def _equal_depths(self, rate, rngs):
    for block in self.blocks():
        block.stochastic_depth = layers.StochasticDepth(rate, rngs=rngs)


_STOCHASTIC_DEPTH = layers.StochasticDepth.__call__

MUTANTS = [
    Mutant(
        name="branches not rescaled",
        difference="35g",
        what="stochastic depth keeps a branch as it is instead of dividing it by its chance",
        patches=[(layers.StochasticDepth, "__call__", _branch_not_rescaled)],
    ),
    Mutant(
        name="stochastic depth alike in all blocks",
        difference="35h",
        what="all branches are dropped equally often instead of rising from the first block",
        patches=[(resnet.ResNet, "_drop_branches", _equal_depths)],
    ),
    Mutant(
        name="BatchNorm momentum 0.99",
        difference="1",
        what="running statistics move by 0.01, Flax's default, instead of 0.1",
        phase="batch_norm",
        layer=_norm(_sets("momentum", 0.01)),
    ),
    Mutant(
        name="biased running variance",
        difference="2",
        what="the running variance divides by n instead of n - 1",
        phase="batch_norm",
        layer=_norm(_becomes(_update=_biased)),
    ),
    Mutant(
        name="one value per channel",
        difference="3",
        what="BatchNorm takes one value per channel in training instead of refusing it",
        patches=[(layers.BatchNorm, "_batch_statistics", _unguarded)],
    ),
    Mutant(
        name="fast variance",
        difference="4",
        what="the variance is E[x^2] - E[x]^2, which loses digits where the mean is large",
        patches=[(layers.BatchNorm, "_batch_statistics", _fast_variance)],
    ),
    Mutant(
        name="BatchNorm eps 1e-3",
        difference="5a",
        what="eps is 1e-3, as in Keras, instead of 1e-5",
        phase="forward",
        layer=_norm(_sets("epsilon", 1e-3)),
    ),
    Mutant(
        name="batches not counted",
        difference="5b",
        what="num_batches_tracked is not increased",
        phase="batch_norm",
        layer=_norm(_becomes(_update=_uncounted)),
    ),
    Mutant(
        name="cumulative running statistics",
        difference="5c",
        what="running statistics are the mean of all batches (momentum=None)",
        phase="batch_norm",
        layer=_norm(_becomes(_update=_cumulative)),
    ),
    Mutant(
        name="SAME convolutions",
        difference="6",
        what='strided convolutions pad "SAME", which is lopsided on even sizes',
        phase="forward",
        layer=_conv(_sets("padding", "SAME"), eligible=_is_strided),
    ),
    Mutant(
        name="SAME max-pool",
        difference="7a",
        what='the max-pool pads "SAME"',
        phase="forward",
        patches=[(layers, "max_pool", _same_max_pool)],
    ),
    Mutant(
        name="zero-padded max-pool",
        difference="7b",
        what="the max-pool pads with 0 instead of -inf",
        patches=[(layers, "max_pool", _zero_padded_max_pool)],
    ),
    Mutant(
        name="padding counted in average pools",
        difference="7c",
        what="average pools divide by the largest window (count_include_pad)",
        patches=[(layers, "_pooling_matrix", _counted_padding)],
    ),
    Mutant(
        name="average pools in ceil mode",
        difference="7d",
        what="average pools cut the map into whole windows (ceil_mode)",
        patches=[(layers, "_pooling_matrix", _whole_windows)],
    ),
    Mutant(
        name="stride on the first 1x1",
        difference="8a",
        what="bottlenecks stride in their 1x1 convolution (v1) instead of the 3x3 (v1.5)",
        phase="forward",
        layer=LayerFault(
            kind=resnet.Bottleneck,
            edit=_stride_on_the_first,
            eligible=lambda block: block.conv2.strides == 2,
        ),
    ),
    Mutant(
        name="residual branches start at zero",
        difference="8b",
        what="the last scale of every block starts at 0 by default",
        patches=[
            (resnet.ResNet.__init__.__kwdefaults__, "zero_init_residual", True),
            (models.create_model.__kwdefaults__, "zero_init_residual", True),
        ],
    ),
    Mutant(
        name="option B without BatchNorm",
        difference="8c",
        what="projections of the CIFAR nets end in their convolution, without BatchNorm",
        patches=[(resnet.Projection, "__call__", _without_norm_in_narrow_nets)],
    ),
    Mutant(
        name="lecun initialiser",
        difference="9a",
        what="convolutions start with Flax's default, a truncated normal by fan-in",
        patches=[(layers, "kaiming_normal_fan_out", nnx.initializers.lecun_normal())],
    ),
    Mutant(
        name="he_normal initialiser",
        difference="9b",
        what="convolutions start with Flax's he_normal, truncated and by fan-in",
        patches=[(layers, "kaiming_normal_fan_out", nnx.initializers.he_normal())],
    ),
    Mutant(
        name="Flax's linear initialisers",
        difference="10a",
        what="linear layers start with a truncated normal, biases with 0",
        patches=[(layers, "uniform_fan_in", _flax_linear)],
    ),
    Mutant(
        name="biases start at 0",
        difference="10b",
        what="linear layers start with biases of 0, their weights as torch's",
        patches=[(layers, "uniform_fan_in", _zero_bias)],
    ),
    Mutant(
        name="transposed kernels",
        difference="11a",
        what="kernels arrive with height and width swapped",
        phase="forward",
        patches=[(convert._LEAVES, ("kernel", 4), ("weight", (3, 2, 1, 0)))],
        layer=_conv(_transpose, eligible=lambda module: module.kernel_size[0] > 1),
    ),
    Mutant(
        name="interleaved groups",
        difference="11b",
        what="output channels of grouped convolutions are interleaved over the groups",
        phase="forward",
        layer=_conv(
            _sets("conv_general_dilated", _interleaved_groups),
            eligible=lambda module: module.feature_group_count > 1,
        ),
    ),
    Mutant(
        name="linear weights not transposed",
        difference="11c",
        what="linear weights are not transposed",
        patches=[(convert._LEAVES, ("kernel", 2), ("weight", (0, 1)))],
    ),
    Mutant(
        name="flattened channels last",
        difference="11d",
        what="maps are flattened in the order height, width, channel",
        patches=[(layers, "flatten_channels_first", lambda x: x.reshape(x.shape[0], -1))],
    ),
    Mutant(
        name="TF32 convolutions",
        difference="12",
        what="operands of convolutions are rounded to 10 bits",
        phase="forward",
        layer=_conv(_sets("conv_general_dilated", _in_tf32)),
    ),
    Mutant(
        name="float64 is float32",
        difference="13",
        what="jax_enable_x64 stays off in float64",
        patches=[(jax, "enable_x64", lambda on=True: contextlib.nullcontext())],
    ),
    Mutant(
        name="half a gradient at zero",
        difference="14",
        what="the gradient of ReLU at 0 is 1/2",
        phase="gradient",
        patches=[(layers, "relu", half_at_zero), (layers, "relu_of_sum", half_at_zero)],
    ),
    Mutant(
        name="dropout not rescaled",
        difference="27a",
        what="dropout does not divide by the share it keeps",
        patches=[(layers.Dropout, "__call__", _unscaled_dropout)],
    ),
    Mutant(
        name="dropout keeps its rate",
        difference="27b",
        what="dropout keeps with the probability to drop",
        patches=[(layers, "keep_mask", _mask_of_dropped)],
    ),
    Mutant(
        name="BatchNorm in float32 under bfloat16",
        difference="29a",
        what="BatchNorm returns float32 in mixed precision",
        layer=_norm(_sets("dtype", jnp.float32), eligible=lambda m: m.dtype == jnp.bfloat16),
    ),
    Mutant(
        name="BatchNorm statistics in bfloat16",
        difference="29c",
        what="BatchNorm computes mean and variance in bfloat16 in mixed precision",
        layer=_norm(_becomes(_batch_statistics=_narrow_statistics)),
    ),
    Mutant(
        name="n of the shard",
        difference="33c",
        what="n / (n - 1) uses the n of one device instead of all devices",
        patches=[(layers.BatchNorm, "_batch_statistics", _count_of_the_shard)],
    ),
    Mutant(
        name="BatchNorm groups of every n-th image",
        difference="33e",
        what="a group of BatchNorm's statistics is every n-th image instead of consecutive ones",
        patches=[(layers.BatchNorm, "_of_groups", _strided_groups)],
    ),
    Mutant(
        name="running variance across groups",
        difference="33f",
        what="the running variance of groups is that of the whole batch, distances of their means"
        " included",
        patches=[(layers.BatchNorm, "_of_groups", _variance_over_groups)],
    ),
    Mutant(
        name="n of all groups",
        difference="33g",
        what="n / (n - 1) uses the n of the whole batch instead of the group",
        patches=[(layers.BatchNorm, "_of_groups", _count_of_the_batch)],
    ),
    Mutant(
        name="BatchNorm momentum stuck at 0",
        difference="33d",
        what="running statistics never move",
        phase="batch_norm",
        layer=_norm(_sets("momentum", 0.0)),
    ),
]
