"""Every known way in which a port differs from PyTorch, as a fault to inject by name.

    with mutants.injected(mutants.MUTANTS["biased running variance"]): ...

The suite proves itself on them: `pytest --mutant NAME` runs its unchanged tests on the faulty code,
and some test of equality has to fail (`kill_matrix.py`). A fault of a layer can also be put into
one layer of one model (`Mutant.layer`), for the localiser to find.

`difference` numbers the 33 known differences; `results/kill-matrix.md` lists them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from PIL import Image

from flax_resnet import convert, losses, models, optim, steps
from flax_resnet.data import augment, pipeline
from flax_resnet.models import cnn, layers, resnet


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFault:
    """A fault of one module."""

    kind: type
    """Of the module."""

    edit: Callable[[nnx.Module], None]
    """Puts the fault in, in place."""

    eligible: Callable[[nnx.Module], bool] = lambda module: True
    """Whether the module has what the fault changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    name: str

    difference: str
    """Number of the known difference, and a letter for its parts."""

    what: str
    """What the faulty code does; PyTorch does the opposite."""

    phase: str | None = None
    """The first phase of a training step that shows it; None: none does."""

    patches: tuple = ()
    """(owner, attribute, faulty value), to put it in everywhere."""

    layer: LayerFault | None = None
    """To put it into one layer; without `patches` also into every one."""


@contextlib.contextmanager
def injected(mutant: Mutant):
    """Within this context flax_resnet and Optax have the fault, everywhere."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in mutant.patches:
            if isinstance(owner, dict):
                stack.enter_context(mock.patch.dict(owner, {name: value}))
            else:
                stack.enter_context(mock.patch.object(owner, name, value))
        if mutant.layer and not mutant.patches:
            stack.enter_context(_edited_when_made(mutant.layer))
        yield


def _edited_when_made(fault: LayerFault):
    original = fault.kind.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if fault.eligible(self):
            fault.edit(self)

    return mock.patch.object(fault.kind, "__init__", init)


def eligible_layers(mutant: Mutant, model: nnx.Module) -> dict[str, nnx.Module]:
    """Torch's names of the modules that can have the fault."""
    fault = mutant.layer
    return {
        ".".join(str(part) for part in path if part != "layers"): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, fault.kind) and fault.eligible(module)
    }


# --- layers ---


def _becomes(**methods):
    """An edit that overrides methods of one module."""

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
    """Operands as the tensor cores take them: 10 bits of mantissa, 8 of exponent."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    rounded = (bits + jnp.uint32(0xFFF) + ((bits >> 13) & jnp.uint32(1))) & jnp.uint32(0xFFFFE000)
    exact = lax.bitcast_convert_type(rounded, jnp.float32).astype(x.dtype)
    return x + lax.stop_gradient(exact - x)


def _in_tf32(lhs, rhs, *args, **kwargs):
    return lax.conv_general_dilated(_tf32(lhs), _tf32(rhs), *args, **kwargs)


def _stride_on_the_first(block):
    block.conv1.strides, block.conv2.strides = block.conv2.strides, block.conv1.strides


def _half_at_zero(x):
    return jnp.maximum(x, 0)


def _same_max_pool(x, window, stride, *, padding=0):
    return nnx.max_pool(x, (window, window), (stride, stride), "SAME")


def _zero_padded_max_pool(x, window, stride, *, padding=0):
    edge = (padding, padding)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    return nnx.max_pool(x, (window, window), (stride, stride), "VALID")


def _whole_windows(length, size):
    """Windows of ceil(length / size) pixels in a row, as ceil_mode places them."""
    window = -(-length // size)
    pixels, cells = np.arange(length), np.arange(size)[:, None]
    inside = (pixels >= cells * window) & (pixels < (cells + 1) * window)
    return inside / np.maximum(inside.sum(1, keepdims=True), 1)


def _counted_padding(length, size):
    """Every cell divides by the largest window, as if what it lacks were padding that counts."""
    matrix = _POOLING_MATRIX(length, size)
    return (matrix > 0) / (matrix > 0).sum(1).max()


_POOLING_MATRIX = layers._pooling_matrix


def _flax_linear(fan_in):
    def init(key, shape, dtype=jnp.float32, **_):
        if len(shape) == 1:
            return jnp.zeros(shape, dtype)
        return nnx.initializers.lecun_normal()(key, shape, dtype)

    return init


def _unscaled_dropout(self, x, keys=None):
    out = _DROPOUT(self, x, keys)
    return out if self.deterministic else out * (1 - self.rate)


_DROPOUT = layers.Dropout.__call__
_BOTH = (resnet, cnn)

_LAYERS = [
    Mutant(
        name="BatchNorm momentum 0.99",
        difference="1",
        what="BatchNorm moves by 0.01, Flax's default, instead of 0.1",
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
        what="num_batches_tracked stays as it is",
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
        patches=[(module, "max_pool", _same_max_pool) for module in (layers, *_BOTH)],
    ),
    Mutant(
        name="zero-padded max-pool",
        difference="7b",
        what="the max-pool pads with 0 instead of -inf",
        patches=[(module, "max_pool", _zero_padded_max_pool) for module in (layers, *_BOTH)],
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
        what="the last scale of every block starts at 0 without being asked",
        patches=[
            (resnet.ResNet.__init__.__kwdefaults__, "zero_init_residual", True),
            (models.create_model.__kwdefaults__, "zero_init_residual", True),
        ],
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
        difference="10",
        what="linear layers start with a truncated normal, biases with 0",
        patches=[(layers, "uniform_fan_in", _flax_linear)],
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
        what="outputs of grouped convolutions go around the groups in turn",
        phase="forward",
        layer=_conv(
            _sets("conv_general_dilated", _interleaved_groups),
            eligible=lambda module: module.feature_group_count > 1,
        ),
    ),
    Mutant(
        name="linear weights not transposed",
        difference="11c",
        what="linear weights are taken as they are",
        patches=[(convert._LEAVES, ("kernel", 2), ("weight", (0, 1)))],
    ),
    Mutant(
        name="flattened channels last",
        difference="11d",
        what="maps are flattened in the order height, width, channel",
        patches=[(cnn, "flatten_channels_first", lambda x: x.reshape(x.shape[0], -1))],
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
        what="float64 is asked for without jax_enable_x64",
        patches=[(jax, "enable_x64", lambda on=True: contextlib.nullcontext())],
    ),
    Mutant(
        name="half a gradient at zero",
        difference="14",
        what="the gradient of ReLU at 0 is 1/2",
        phase="gradient",
        patches=[(module, "relu", _half_at_zero) for module in (layers, *_BOTH)],
    ),
    Mutant(
        name="dropout not rescaled",
        difference="27",
        what="dropout does not divide by the share it keeps",
        patches=[(layers.Dropout, "__call__", _unscaled_dropout)],
    ),
    Mutant(
        name="BatchNorm in float32 under bfloat16",
        difference="29a",
        what="BatchNorm gives float32 in mixed precision",
        layer=_norm(_sets("dtype", jnp.float32), eligible=lambda m: m.dtype == jnp.bfloat16),
    ),
    Mutant(
        name="n of the shard",
        difference="33c",
        what="n / (n - 1) takes the n of one device instead of all",
        patches=[(layers.BatchNorm, "_batch_statistics", _count_of_the_shard)],
    ),
    Mutant(
        name="BatchNorm momentum stuck at 0",
        difference="33d",
        what="running statistics never move",
        phase="batch_norm",
        layer=_norm(_sets("momentum", 0.0)),
    ),
]


# --- optimizers ---


def _with_config(**changes):
    """make_optimizer of a config with other fields."""

    def make(config, **kwargs):
        return _MAKE_OPTIMIZER(dataclasses.replace(config, **changes), **kwargs)

    return make


def _dampened(decay, nesterov=False, **kwargs):
    return optax.chain(optax.scale(1 - decay), _TRACE(decay, nesterov, **kwargs))


def _without_nesterov(decay, nesterov=False, **kwargs):
    return _TRACE(decay, **kwargs)


def _adam_eps_in_root(b1, b2, eps, **kwargs):
    return _ADAM(b1, b2, 0.0, eps_root=eps**2, **kwargs)


def _narrow_correction(moment, decay, count):
    share = (1 - jnp.float32(decay) ** count.astype(jnp.float32)).astype(jnp.float32)
    return jax.tree.map(lambda t: t / share.astype(t.dtype), moment)


def _adamw_decay_without_rate(config, *, learning_rate=0.0, momentum=None):
    if config.optimizer != "adamw":
        return _MAKE_OPTIMIZER(config, learning_rate=learning_rate, momentum=momentum)
    spared = dataclasses.replace(config, weight_decay=0.0)
    return optax.chain(
        _MAKE_OPTIMIZER(spared, learning_rate=learning_rate, momentum=momentum),
        optax.add_decayed_weights(-config.weight_decay, mask=optim._decay_mask(config)),
    )


def _rms_eps_in_root(decay, eps, eps_in_sqrt):
    return _RMS(decay, eps, eps_in_sqrt=True)


def _stddev_eps_in_root(decay, eps, eps_in_sqrt):
    return _STDDEV(decay, eps, eps_in_sqrt=True)


def _rate_before_momentum(config, *, learning_rate=0.0, momentum=None):
    if config.optimizer != "rmsprop" or not config.momentum:
        return _MAKE_OPTIMIZER(config, learning_rate=learning_rate, momentum=momentum)
    plain = dataclasses.replace(config, momentum=0.0)
    rule = _MAKE_OPTIMIZER(plain, learning_rate=learning_rate, momentum=momentum)
    return optax.chain(rule, optax.trace(config.momentum))


def _default_rms_decay(config, *args, **kwargs):
    if config.optimizer == "rmsprop":
        config = dataclasses.replace(config, alpha=0.9)
    return _MAKE_OPTIMIZER(config, *args, **kwargs)


def _ema_from_zero(state, params, config):
    moved = state._replace(ema=jax.tree.map(jnp.zeros_like, params))
    later = _EMA(state._replace(step=jnp.maximum(state.step, config.accumulate_steps)), params,
                 config)  # fmt: skip
    first = jax.tree.map(lambda old, new: (1 - config.ema_decay) * new, moved.ema, params)
    starts = state.step < config.accumulate_steps
    return jax.tree.map(lambda a, b: jnp.where(starts, a, b), first, later)


def _equal_average(state, params, config):
    updates = state.step // config.accumulate_steps
    updated = (state.step + 1) % config.accumulate_steps == 0
    return jax.tree.map(
        lambda old, new: jnp.where(updated, old + (new - old) / (updates + 1), old),
        state.ema,
        params,
    )


def _warmed_up(state, params, config):
    updates = state.step // config.accumulate_steps
    decay = jnp.minimum(config.ema_decay, (1 + updates) / (10 + updates))
    updated = (state.step + 1) % config.accumulate_steps == 0
    return jax.tree.map(
        lambda old, new: jnp.where(updated, decay * old + (1 - decay) * new, old),
        state.ema,
        params,
    )


def _averaged_buffers(state, gradients, stats, config, *rest):
    if config.optimizer.ema_decay:
        decay = config.optimizer.ema_decay
        stats = jax.tree.map(
            lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype),
            state.batch_stats,
            stats,
        )
    return _STEP_UPDATE(state, gradients, stats, config, *rest)


_MAKE_OPTIMIZER = optim.make_optimizer
_TRACE, _ADAM = optax.trace, optax.scale_by_adam
_RMS, _STDDEV = optax.scale_by_rms, optax.scale_by_stddev
_EMA, _STEP_UPDATE = steps._moving_average, steps._update

_OPTIMIZERS = [
    Mutant(
        name="decoupled weight decay",
        difference="15a",
        what="weight decay shrinks the weights instead of adding to the gradient",
        phase="optimizer",
        patches=[(optim, "make_optimizer", _with_config(decoupled_weight_decay=True))],
    ),
    Mutant(
        name="dampened momentum",
        difference="15b",
        what="gradients enter the momentum times 1 - momentum",
        phase="optimizer",
        patches=[(optax, "trace", _dampened)],
    ),
    Mutant(
        name="no Nesterov",
        difference="15c",
        what="Nesterov's momentum is the plain one",
        phase="parameters",
        patches=[(optax, "trace", _without_nesterov)],
    ),
    Mutant(
        name="norm and bias spared",
        difference="16",
        what="BatchNorm and biases are not decayed",
        phase="optimizer",
        patches=[(optim, "_decay_mask", lambda c: lambda p: jax.tree.map(lambda x: x.ndim > 1, p))],
    ),
    Mutant(
        name="Adam's eps in the root",
        difference="17",
        what="eps is added under Adam's root",
        patches=[(optax, "scale_by_adam", _adam_eps_in_root)],
    ),
    Mutant(
        name="Adam's correction in float32",
        difference="18",
        what="1 - beta^t is rounded to float32",
        patches=[(optax.tree, "bias_correction", _narrow_correction)],
    ),
    Mutant(
        name="AdamW decays without the rate",
        difference="19",
        what="AdamW's decay is not multiplied by the learning rate",
        patches=[(optim, "make_optimizer", _adamw_decay_without_rate)],
    ),
    Mutant(
        name="RMSprop's eps in the root",
        difference="20a",
        what="eps is added under RMSprop's root",
        patches=[
            (optax, "scale_by_rms", _rms_eps_in_root),
            (optax, "scale_by_stddev", _stddev_eps_in_root),
        ],
    ),
    Mutant(
        name="RMSprop's rate before momentum",
        difference="20b",
        what="the learning rate goes into RMSprop's momentum",
        patches=[(optim, "make_optimizer", _rate_before_momentum)],
    ),
    Mutant(
        name="RMSprop's decay 0.9",
        difference="20c",
        what="RMSprop forgets with 0.9, Optax's default",
        patches=[(optim, "make_optimizer", _default_rms_decay)],
    ),
    Mutant(
        name="clipping without 1e-6",
        difference="21",
        what="gradients are clipped by max / norm",
        patches=[(optim, "clip_by_global_norm", optax.clip_by_global_norm)],
    ),
    Mutant(
        name="average starts at zero",
        difference="28a",
        what="the moving average starts at 0 instead of the first weights",
        patches=[(steps, "_moving_average", _ema_from_zero)],
    ),
    Mutant(
        name="equal average",
        difference="28b",
        what="all weights so far count alike, AveragedModel's default",
        patches=[(steps, "_moving_average", _equal_average)],
    ),
    Mutant(
        name="average with a warm-up",
        difference="28c",
        what="the decay of the average rises with the updates, as timm's",
        patches=[(steps, "_moving_average", _warmed_up)],
    ),
    Mutant(
        name="averaged buffers",
        difference="28d",
        what="running statistics are averaged too instead of copied",
        patches=[(steps, "_update", _averaged_buffers)],
    ),
]


# --- schedules ---


def _schedule(kind, course):
    """A main schedule that differs for one kind."""

    def main(config, lr, updates_per_epoch, total):
        own = _MAIN_SCHEDULE(config, lr, updates_per_epoch, total)
        return course(config, lr, total, own) if config.schedule == kind else own

    return [(optim, "_main_schedule", main)]


def _stays_down(config, lr, total, own):
    return lambda step: own(jnp.minimum(step, total))


def _relative_end(config, lr, total, own):
    return _MAIN_SCHEDULE(dataclasses.replace(config, min_lr=config.min_lr * lr), lr, 1, total)


def _optax_one_cycle(config, lr, total, own):
    return optax.cosine_onecycle_schedule(
        total, lr, config.pct_start, config.div_factor, config.final_div_factor
    )


def _late_peak(start, middle, end, pct_start, total):
    return _ONE_CYCLE(start, middle, end, min(pct_start + 1 / total, 0.99), total)


def _plateau(**changes):
    def plateau(state, value, config, lr, mode):
        faulty = {name: change(config, lr) for name, change in changes.items()}
        return _PLATEAU(state, value, dataclasses.replace(config, **faulty), lr, mode)

    return [(optim, "plateau", plateau)]


_MAIN_SCHEDULE, _ONE_CYCLE, _PLATEAU = optim._main_schedule, optim._one_cycle, optim.plateau

_SCHEDULES = [
    Mutant(
        name="cosine stays down",
        difference="23a",
        what="after its end the cosine stays at 0 instead of rising again",
        patches=_schedule("cosine", _stays_down),
    ),
    Mutant(
        name="cosine ends at a share",
        difference="23b",
        what="the cosine's end is a share of the learning rate instead of a rate",
        patches=_schedule("cosine", _relative_end),
    ),
    Mutant(
        name="Optax's one-cycle",
        difference="24a",
        what="one-cycle is Optax's, one step later throughout",
        patches=_schedule("onecycle", _optax_one_cycle),
    ),
    Mutant(
        name="late peak",
        difference="24b",
        what="one-cycle peaks one step later",
        patches=[(optim, "_one_cycle", _late_peak)],
    ),
    Mutant(
        name="momentum not cycled",
        difference="24c",
        what="one-cycle leaves the momentum alone",
        patches=[(optim, "make_momentum_schedule", lambda *args: None)],
    ),
    Mutant(
        name="plateau one epoch early",
        difference="26a",
        what="the plateau cuts when bad == patience",
        patches=_plateau(plateau_patience=lambda c, lr: max(c.plateau_patience - 1, 0)),
    ),
    Mutant(
        name="no cooldown",
        difference="26b",
        what="the plateau has no cooldown",
        patches=_plateau(plateau_cooldown=lambda c, lr: 0),
    ),
    Mutant(
        name="plateau ends at a share",
        difference="26c",
        what="the plateau's least rate is a share of the learning rate",
        patches=_plateau(min_lr=lambda c, lr: c.min_lr * lr),
    ),
]


# --- losses and metrics ---


def _over_the_others(labels, num_classes, smoothing, dtype=jnp.float32):
    return _SOFT_TARGETS(labels, num_classes, smoothing * num_classes / (num_classes - 1), dtype)


def _narrow_loss(logits, targets):
    return optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))


def _mean_of_means(network, preprocess, *, num_classes):
    eval_step = _EVAL_STEP(network, preprocess, num_classes=num_classes)

    def step(variables, batch):
        sums = eval_step(variables, batch)
        return sums | {"loss": sums["loss"] / sums["count"] * batch["mask"].size}

    return step


def _last_of_equals(logits, labels):
    return _AHEAD(logits[:, ::-1], logits.shape[1] - 1 - labels)


_SOFT_TARGETS, _EVAL_STEP, _AHEAD = losses.soft_targets, steps.make_eval_step, steps._ahead

_LOSSES = [
    Mutant(
        name="smoothing over the other classes",
        difference="22a",
        what="label smoothing spreads e over the K - 1 other classes",
        phase="loss",
        patches=[(losses, "soft_targets", _over_the_others)],
    ),
    Mutant(
        name="loss in bfloat16",
        difference="29b",
        what="cross-entropy is computed in bfloat16 in mixed precision",
        patches=[(losses, "cross_entropy", _narrow_loss)],
    ),
    Mutant(
        name="mean of means",
        difference="33a",
        what="the last, smaller batch counts as much as the others",
        patches=[(steps, "make_eval_step", _mean_of_means)],
    ),
    Mutant(
        name="last of equals",
        difference="33b",
        what="of equal logits the last comes first in the top five",
        patches=[(steps, "_ahead", _last_of_equals)],
    ),
]


# --- images ---


def _resample(method, **options):
    def resize(image, shape):
        resized = jax.image.resize(
            jnp.asarray(image, jnp.float32), (*shape, image.shape[-1]), method, **options
        )
        return np.asarray(jnp.clip(jnp.round(resized), 0, 255), np.uint8)

    return [(pipeline, "_resize", resize)]


def _bicubic(image, shape):
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    return resized.reshape(*shape, image.shape[-1])


def _half_by_half(image, size):
    top, left = (s // 2 - size // 2 for s in image.shape[:2])
    return image[top : top + size, left : left + size]


def _rounded_side(self, image, rng=None):
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = [round(self.resize * side / short) for side in (height, width)]
    return pipeline._centre_crop(pipeline._resize(image, scaled), self.size)


def _additive_brightness(images, numbers, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, numbers[:, None], axis=1))
    brighter = jnp.clip(images + factor - 1, 0, 1)
    is_brightness = augment._per_image(numbers) == augment.BRIGHTNESS
    return jnp.where(is_brightness, brighter, _ADJUST(images, numbers, factors, active))


def _contrast_around_channels(images, numbers, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, numbers[:, None], axis=1))
    mean = images.mean((1, 2), keepdims=True)
    blended = jnp.clip(factor * images + (1 - factor) * mean, 0, 1)
    is_contrast = augment._per_image(numbers) == augment.CONTRAST
    return jnp.where(is_contrast, blended, _ADJUST(images, numbers, factors, active))


def _saturation_in_hsv(images, numbers, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, numbers[:, None], axis=1))
    value = images.max(-1, keepdims=True)
    blended = jnp.clip(value - factor * (value - images), 0, 1)
    is_saturation = augment._per_image(numbers) == augment.SATURATION
    return jnp.where(is_saturation, blended, _ADJUST(images, numbers, factors, active))


def _sorted_order(images, order, factors, **options):
    return _COLOR_JITTER(images, jnp.sort(order, axis=1), factors, **options)


def _unclamped(images, numbers, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, numbers[:, None], axis=1))
    partner = _ADJUST(images, numbers, jnp.zeros_like(factors), active)
    blended = factor * images + (1 - factor) * partner
    is_hue = augment._per_image(numbers) == augment.HUE
    return jnp.where(is_hue, _ADJUST(images, numbers, factors, active), blended)


_ADJUST, _COLOR_JITTER = augment._adjust, augment.color_jitter

_IMAGES = [
    Mutant(
        name="resized without antialias",
        difference="30a",
        what="images shrink without antialiasing, as torch's tensors do",
        patches=_resample("bilinear", antialias=False),
    ),
    Mutant(
        name="resized to the nearest",
        difference="30b",
        what="resizing takes the nearest pixel",
        patches=_resample("nearest"),
    ),
    Mutant(
        name="resized bicubically",
        difference="30c",
        what="resizing is bicubic",
        patches=[(pipeline, "_resize", _bicubic)],
    ),
    Mutant(
        name="crop half by half",
        difference="31a",
        what="the centre crop starts at H // 2 - h // 2",
        patches=[(pipeline, "_centre_crop", _half_by_half)],
    ),
    Mutant(
        name="longer side rounded",
        difference="31b",
        what="the longer side is rounded instead of truncated",
        patches=[(pipeline.Decoder, "__call__", _rounded_side)],
    ),
    Mutant(
        name="additive brightness",
        difference="32a",
        what="brightness is added instead of multiplied",
        patches=[(augment, "_adjust", _additive_brightness)],
    ),
    Mutant(
        name="contrast around each channel",
        difference="32b",
        what="contrast is around each channel's mean instead of the gray one",
        patches=[(augment, "_adjust", _contrast_around_channels)],
    ),
    Mutant(
        name="saturation in HSV",
        difference="32c",
        what="saturation blends towards the value of HSV instead of gray",
        patches=[(augment, "_adjust", _saturation_in_hsv)],
    ),
    Mutant(
        name="jitter in a fixed order",
        difference="32d",
        what="brightness, contrast, saturation and hue always come in this order",
        patches=[(augment, "color_jitter", _sorted_order)],
    ),
    Mutant(
        name="jitter not clamped",
        difference="32e",
        what="colours may leave [0, 1]",
        patches=[(augment, "_adjust", _unclamped)],
    ),
]

GROUPS = {
    "layers": _LAYERS,
    "optimizers": _OPTIMIZERS,
    "schedules": _SCHEDULES,
    "losses": _LOSSES,
    "images": _IMAGES,
}

MUTANTS = {mutant.name: mutant for group in GROUPS.values() for mutant in group}
"""All of them by name, in the order of this file."""

NOT_APPLICABLE = {
    "22b": "class weights: neither side offers them, so there is nothing to put the fault into",
    "25": "step, multi-step and warm-up agree in both frameworks: a control that must not fail",
}
"""Parts of the known differences without a mutant, and why."""
