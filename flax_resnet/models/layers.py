"""Layers with PyTorch's semantics: padding, pools, BatchNorm, dropout.

Images are `[B, H, W, C]`, kernels `[kh, kw, C / groups, O]`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_resnet.errors import InputError
from flax_resnet.kernels import cpu_convolution, sliced_max_pool
from flax_resnet.kernels.cpu_sum import library_sum, sum_of_pixels
from flax_resnet.models.initializers import kaiming_normal_fan_out, uniform_fan_in


class _Named(nnx.Module):
    """A layer whose operations carry its name in compiled programs and profiles."""

    layer_name = ""

    def __call__(self, x):
        with jax.named_scope(self.layer_name or type(self).__name__):
            return super().__call__(x)


class Conv(_Named, nnx.Conv):
    def __call__(self, x):
        out = super().__call__(x)
        # Otherwise XLA widens the result for BatchNorm before it changes the layout of a grouped
        # convolution on a TPU, and writes it in float32.
        return out if self.feature_group_count == 1 else lax.optimization_barrier(out)


class Linear(_Named, nnx.Linear):
    pass


def named(model: nnx.Module) -> nnx.Module:
    """The model, whose blocks, convolutions, BatchNorms and linear layers now know their names, as
    "layer1.0" and "layer1.0.conv1"."""
    for name, module in module_names(model).items():
        if hasattr(module, "layer_name"):
            module.layer_name = name
    return model


def module_names(model: nnx.Module) -> dict[str, nnx.Module]:
    """The modules of a model by torch's names, as "layer1.0.conv1"; the model itself is ""."""
    return {
        ".".join(str(part) for part in path if part != "layers"): module
        for path, module in nnx.iter_modules(model)
    }


PRECISIONS = {"default": (None, "highest"), "tf32": ("high", "high"),
              "highest": ("highest", "highest")}  # fmt: skip
"""{name: JAX's precision of (convolutions, linear layers) whose operands are float32}

PyTorch's default on a GPU lets cuDNN round the operands of convolutions to TF32, but not cuBLAS
those of matrix products. "high" is TF32 on a GPU and three bfloat16 passes on a TPU."""


def _precision(name, place, dtype, param_dtype):
    """JAX's precision of a layer; operands of other types than float32 are never rounded."""
    computed = jnp.dtype(dtype or param_dtype)
    return PRECISIONS[name][place] if computed == jnp.float32 else None


def conv(
    in_features,
    out_features,
    kernel_size,
    *,
    stride=1,
    padding=0,
    groups=1,
    bias=False,
    dtype=None,
    param_dtype=jnp.float32,
    kernels="auto",
    precision="default",
    rngs,
) -> Conv:
    """torch.nn.Conv2d: `padding` pixels on every side, never "SAME", which differs at stride 2.

    Without a bias it starts as torchvision's ResNets do, with one as Conv2d does by default.
    """
    fan_in = in_features // groups * kernel_size**2
    own = cpu_convolution.conv_general_dilated
    return Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=stride,
        padding=[(padding, padding)] * 2,
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=uniform_fan_in(fan_in) if bias else kaiming_normal_fan_out,
        bias_init=uniform_fan_in(fan_in),
        dtype=dtype,
        param_dtype=param_dtype,
        precision=_precision(precision, 0, dtype, param_dtype),
        conv_general_dilated=lax.conv_general_dilated if kernels == "library" else own,
        rngs=rngs,
    )


def linear(
    in_features,
    out_features,
    *,
    dtype=None,
    param_dtype=jnp.float32,
    precision="default",
    rngs,
) -> Linear:
    """torch.nn.Linear with its default initialisers."""
    return Linear(
        in_features,
        out_features,
        kernel_init=uniform_fan_in(in_features),
        bias_init=uniform_fan_in(in_features),
        dtype=dtype,
        param_dtype=param_dtype,
        precision=_precision(precision, 1, dtype, param_dtype),
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """torch.nn.BatchNorm2d over the last axis.

    Where Flax's differs: momentum 0.1 is the weight of the new value; the running variance is
    the unbiased one, n / (n - 1); the variance is the mean squared distance from the mean, not
    E[x^2] - E[x]^2, which loses all digits where the mean is large; one value per channel in
    training is an error; batches are counted. Statistics are float32 or wider in any `dtype`.

    `axis_name` names the devices of a pmap or shard_map; they then share the statistics of the
    global batch, as they do under a sharded jit without it.

    With `group_size` every so many consecutive images of the global batch have statistics of their
    own, and the running statistics move to the mean of those of the groups. Devices exchange
    nothing then unless a group lies on several; each has the running statistics of its own groups,
    which the training step averages.
    """

    layer_name = ""

    def __init__(
        self,
        num_features,
        *,
        momentum=0.1,
        epsilon=1e-5,
        axis_name=None,
        group_size=None,
        dtype=None,
        param_dtype=jnp.float32,
        kernels="auto",
        rngs=None,
    ):
        del rngs  # nothing here is random
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))
        self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.momentum = momentum
        self.epsilon = epsilon
        self.axis_name = axis_name
        self.group_size = group_size
        self.dtype = dtype
        self.kernels = kernels
        self.use_running_average = False

    def __call__(self, x):
        """`[B, ..., C]` -> the same shape, in `dtype` or else the input's type."""
        with jax.named_scope(self.layer_name or type(self).__name__):
            return self._normalized(x)

    def _normalized(self, x):
        dtype = self.dtype or x.dtype
        if self.use_running_average:
            rstd = lax.rsqrt(self.var[...] + self.epsilon)
            scale, bias = self.scale[...], self.bias[...]
            return _normalize(_wide(x), self.mean[...], rstd, scale, bias).astype(dtype)
        several = self.group_size is not None and len(x) > self.group_size
        out, mean, var, count = (self._of_groups if several else self._of_one_group)(x)
        self._update(mean, var, count)
        return out.astype(dtype)

    def _of_groups(self, x):
        """`_of_one_group` for each group of images, with the means of their statistics."""
        if len(x) % self.group_size:
            raise InputError(
                f"BatchNorm: {len(x)} images cannot be divided into groups of {self.group_size}"
            )
        groups = x.reshape(-1, self.group_size, *x.shape[1:])
        in_turn = jax.vmap(self._of_one_group, out_axes=(0, 0, 0, None))
        out, mean, var, count = in_turn(groups)
        return out.reshape(x.shape), mean.mean(0), var.mean(0), count

    def _of_one_group(self, x):
        """x normalised by statistics of its own, and what `_batch_statistics` finds of it."""
        mean, var, count = self._batch_statistics(x)
        x = _wide(x)
        rstd, scale, bias = lax.rsqrt(var + self.epsilon), self.scale[...], self.bias[...]
        if self.kernels == "library":
            return _normalize(x, mean, rstd, scale, bias), mean, var, count
        fixed = lax.stop_gradient((mean, rstd))
        out = _standardize(x, *fixed, scale, bias, self._peers(len(x)))
        return out, mean, var, count

    def _peers(self, num_images):
        """The axis and the groups of devices that share the statistics of so many images each, as
        `_mean_of_devices` takes them; None if one device has all of them."""
        if self.axis_name is None or num_images == self.group_size:
            return None
        if self.group_size is None:
            return self.axis_name, None
        devices = lax.axis_size(self.axis_name)
        size, rest = divmod(self.group_size, num_images)
        if rest or devices % size:
            raise InputError(
                f"BatchNorm: {devices} devices with {num_images} images each cannot share groups"
                f" of {self.group_size}"
            )
        return self.axis_name, tuple(tuple(range(i, i + size)) for i in range(0, devices, size))

    def _batch_statistics(self, x):
        """Mean `[C]`, biased variance `[C]` and the number of values behind each, in one pass.

        Distances are taken from the mean of the first image (shifted data: Chan, Golub and LeVeque
        1983). No square of that mean's distance from the batch's is larger than B times the
        variance, so the variance loses at most log2(B) bits, whatever the mean. torch sums in
        float64 on the CPU.
        """
        peers = self._peers(len(x))
        count = _values(x)
        if peers is not None:
            count *= lax.psum(1, peers[0], axis_index_groups=peers[1])
        if count < 2:
            raise InputError(
                "BatchNorm in training needs more than one value per channel: take several images"
                " at once, or larger ones, or call model.eval() first"
            )
        # Widened after it is cut out: otherwise XLA writes all of x in float32 too on a TPU.
        of_one_image = _wide(x[0]).mean(tuple(range(x.ndim - 2)))
        shift = lax.stop_gradient(_mean_of_devices(of_one_image, peers))
        distance = _wide(x) - _per_channel(shift, x)
        sums = _sums(distance, jnp.square(distance), kernels=self.kernels)
        rest, square = _mean_of_devices(sums / _values(x), peers)
        return shift + rest, square - jnp.square(rest), count

    def _update(self, mean, var, count):
        # `variable[...] = x` reads the tracer's sharding, which raises and walks the whole trace
        # (jax-ml/jax#40041); `set_value` does not. ResNet-44: 5.1 s to trace against 1.9.
        unbiased = var * (count / (count - 1))
        self.mean.set_value(_moving(self.mean[...], mean, self.momentum))
        self.var.set_value(_moving(self.var[...], unbiased, self.momentum))
        self.num_batches_tracked.set_value(self.num_batches_tracked[...] + 1)


def _wide(x):
    """x in float32 or in its own wider type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _values(x) -> float:
    """The number of values of a channel, as a float because it may be larger than an int32."""
    return float(math.prod(x.shape[:-1]))


def _mean_of_devices(x, peers):
    """The mean over the devices of `BatchNorm._peers`."""
    if peers is None:
        return x
    axis_name, groups = peers
    return lax.pmean(x, axis_name, axis_index_groups=groups)


def _moving(old, new, momentum):
    return (1 - momentum) * old + momentum * new.astype(old.dtype)


def _sums(*arrays, kernels="auto"):
    """Each summed over all axes but the last: `[N, C]` of N arrays.

    Image by image and then over the images: two short sums lose fewer digits than a long one. The
    second is a product with ones, which XLA cannot fuse with the first.
    """
    of_pixels = library_sum if kernels == "library" else sum_of_pixels
    images = jnp.concatenate([of_pixels(x) for x in arrays], axis=1)
    ones = jnp.ones(len(images), images.dtype)
    return jnp.dot(ones, images, precision="highest").reshape(len(arrays), -1)


def _per_channel(vector, x):
    """`[C]` -> `[1, ..., 1, C]`, with as many axes as x."""
    return jnp.expand_dims(vector, range(x.ndim - 1))


def _normalize(x, mean, rstd, scale, bias):
    return (x - _per_channel(mean, x)) * _per_channel(rstd * scale, x) + _per_channel(bias, x)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _standardize(x, mean, rstd, scale, bias, peers):
    """`_normalize` with the statistics of x itself, its mean and 1 / standard deviation.

    The gradient (Ioffe and Szegedy 2015, section 3) in two sums; differentiating the statistics
    operation by operation takes 1.2 to 2.3 times as long on a CPU (`results/README.md`).
    """
    return _normalize(x, mean, rstd, scale, bias)


def _standardize_forward(x, mean, rstd, scale, bias, peers):
    return _normalize(x, mean, rstd, scale, bias), (x, mean, rstd, scale)


def _standardize_backward(peers, saved, gradient):
    x, mean, rstd, scale = saved
    standard = (x - _per_channel(mean, x)) * _per_channel(rstd, x)
    sums = _sums(gradient, gradient * standard)
    means = _mean_of_devices(sums / _values(x), peers)
    rest = gradient - _per_channel(means[0], x) - standard * _per_channel(means[1], x)
    # What the statistics pass on is in `rest`; they themselves are given as constants.
    return (
        rest * _per_channel(rstd * scale, x),
        jnp.zeros_like(mean),
        jnp.zeros_like(rstd),
        sums[1],
        sums[0],
    )


_standardize.defvjp(_standardize_forward, _standardize_backward)


class Dropout(nnx.Module):
    """torch.nn.Dropout. Draws belong to the example: each row has its own key."""

    def __init__(self, rate, *, rngs=None):
        self.rate = rate
        self.deterministic = False
        self.rngs = rngs.fork() if rngs is not None and rate > 0 else None

    def __call__(self, x, keys=None):
        """`[B, C]`, keys `[B]` (left out: drawn from the module's own stream) -> `[B, C]`."""
        if self.deterministic or self.rate == 0:
            return x
        return _dropped(x, self.rate, self.rngs, keys, x.shape[1:])


class StochasticDepth(nnx.Module):
    """torchvision's StochasticDepth of mode "row": drops a branch for single images."""

    def __init__(self, rate, *, rngs=None):
        self.rate = rate
        self.deterministic = False
        self.rngs = rngs.fork() if rngs is not None else None

    def __call__(self, x, keys=None):
        """`[B, H, W, C]`, keys `[B]` (left out: drawn from the module's own stream) -> the same."""
        if self.deterministic:
            return x
        return _dropped(x, self.rate, self.rngs, keys, (1, 1, 1))


def _dropped(x, rate, rngs, keys, shape):
    """x `[B, ...]` with parts of `shape` set to zero and the others divided by 1 - rate."""
    if keys is None:
        keys = jax.random.split(rngs.dropout(), x.shape[0])
    return jnp.where(keep_mask(keys, 1 - rate, shape), x / (1 - rate), jnp.zeros_like(x))


def keep_mask(keys, probability, shape):
    """keys `[B]` -> boolean `[B, *shape]`, True with this probability."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability, shape))(keys)


def relu(x):
    """torch.nn.ReLU: its gradient at 0 is 0, where that of `jnp.maximum(x, 0)` would be 1/2."""
    return nnx.relu(x)


@jax.custom_vjp
def relu_of_sum(x):
    """`relu` whose gradient looks at the output, which the next layer keeps, and not at the sum."""
    return lax.platform_dependent(x, cpu=_computed_once, default=nnx.relu)


def _computed_once(x):
    """`relu` as a choice, because XLA's CPU compiler computes a maximum again for every reader.

    Where the reader is the next block, it computes the sums of all earlier blocks of the stage
    again.
    """
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _relu_forward(x):
    out = relu_of_sum(x)
    return out, out


def _relu_backward(out, gradient):
    kept = lax.optimization_barrier(out)  # else the compiler goes back to the sum
    return (jnp.where(kept > 0, gradient, jnp.zeros_like(gradient)),)


relu_of_sum.defvjp(_relu_forward, _relu_backward)


def max_pool(x, window, stride, *, padding=0, kernels="auto"):
    """torch.nn.MaxPool2d: padded with -inf on every side, never "SAME".

    Of equal numbers the first takes the gradient.
    """
    if kernels == "library":
        return nnx.max_pool(x, (window, window), (stride, stride), [(padding, padding)] * 2)
    return sliced_max_pool.max_pool(x, window, stride, padding)


def global_average_pool(x):
    """torch.nn.AdaptiveAvgPool2d(1) and flatten: `[B, H, W, C]` -> `[B, C]`."""
    return x.mean((1, 2))


def adaptive_average_pool(x, size):
    """torch.nn.AdaptiveAvgPool2d: `[B, H, W, C]` -> `[B, size, size, C]`, any H and W.

    Cell i averages the pixels from floor(i H / size) to ceil((i + 1) H / size).
    """
    rows = jnp.asarray(_pooling_matrix(x.shape[1], size), x.dtype)
    columns = jnp.asarray(_pooling_matrix(x.shape[2], size), x.dtype)
    # Averages are no products to PyTorch: it never rounds their operands.
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def _pooling_matrix(length, size):
    cells = np.arange(size)
    start, stop = cells * length // size, -(-(cells + 1) * length // size)
    pixels = np.arange(length)
    inside = (pixels >= start[:, None]) & (pixels < stop[:, None])
    return inside / inside.sum(1, keepdims=True)


def flatten_channels_first(x):
    """`[B, H, W, C]` -> `[B, C * H * W]`, in torch's order, so that Linear weights carry over."""
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], math.prod(x.shape[1:]))  # also of no image
