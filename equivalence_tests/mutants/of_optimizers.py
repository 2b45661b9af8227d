"""Faults of the optimizers, of weight decay and of the moving average."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from equivalence_tests.mutants.mutant import Mutant
from flax_resnet.training import optim, steps


def _with_config(**changes):
    """make_optimizer with changed fields of its config."""

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


def _momentum_unused(config, *, learning_rate=0.0, momentum=None):
    return _MAKE_OPTIMIZER(config, learning_rate=learning_rate)


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


def _ema_from_zero(ema, params, batches, config, copied=0):
    later = _EMA(ema, params, jnp.maximum(batches, config.accumulate_steps), config)
    first = jax.tree.map(lambda new: (1 - config.ema_decay) * new, params)
    starts = batches < config.accumulate_steps
    return jax.tree.map(lambda a, b: jnp.where(starts, a, b), first, later)


def _equal_average(ema, params, batches, config, copied=0):
    updates = batches // config.accumulate_steps
    updated = (batches + 1) % config.accumulate_steps == 0
    return jax.tree.map(
        lambda old, new: jnp.where(updated, old + (new - old) / (updates + 1), old),
        ema,
        params,
    )


def _warmed_up(ema, params, batches, config, copied=0):
    updates = batches // config.accumulate_steps
    decay = jnp.minimum(config.ema_decay, (1 + updates) / (10 + updates))
    updated = (batches + 1) % config.accumulate_steps == 0
    return jax.tree.map(
        lambda old, new: jnp.where(updated, decay * old + (1 - decay) * new, old),
        ema,
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
    return _APPLY_GRADIENTS(state, gradients, stats, config, *rest)


def _averaged_after_every_update(ema, params, batches, config, copied=0):
    return _EMA(ema, params, batches, dataclasses.replace(config, ema_steps=1), copied)


def _adapted_without_decay(config):
    return lambda params: jax.tree.map(lambda leaf: True, params)


_MAKE_OPTIMIZER = optim.make_optimizer
_TRACE, _ADAM = optax.trace, optax.scale_by_adam
_RMS, _STDDEV = optax.scale_by_rms, optax.scale_by_stddev
_EMA, _APPLY_GRADIENTS = steps._moving_average, steps.apply_gradients

MUTANTS = [
    Mutant(
        name="decoupled weight decay",
        difference="15a",
        what="weight decay shrinks the weights instead of being added to the gradient",
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
        what="momentum is plain instead of Nesterov's",
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
        what="RMSprop's momentum accumulates updates times the learning rate",
        patches=[(optim, "make_optimizer", _rate_before_momentum)],
    ),
    Mutant(
        name="RMSprop's decay 0.9",
        difference="20c",
        what="RMSprop's decay rate is 0.9, Optax's default",
        patches=[(optim, "make_optimizer", _default_rms_decay)],
    ),
    Mutant(
        name="clipping without 1e-6",
        difference="21",
        what="gradients are clipped by max / norm",
        patches=[(optim, "clip_by_global_norm", optax.clip_by_global_norm)],
    ),
    Mutant(
        name="cycled momentum unused",
        difference="24d",
        what="the momentum of one-cycle does not reach the optimizer",
        patches=[(optim, "make_optimizer", _momentum_unused)],
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
        what="all weights so far have equal weight in the average, AveragedModel's default",
        patches=[(steps, "_moving_average", _equal_average)],
    ),
    Mutant(
        name="average with a warm-up",
        difference="28c",
        what="the decay of the average rises with the updates, as timm's",
        patches=[(steps, "_moving_average", _warmed_up)],
    ),
    Mutant(
        name="average of every update",
        difference="28e",
        what="every update enters the moving average, whatever its interval",
        patches=[(steps, "_moving_average", _averaged_after_every_update)],
    ),
    Mutant(
        name="LAMB adapts spared parameters",
        difference="35a",
        what="LAMB adapts the rate of parameters that do not decay too, as the paper and Optax",
        patches=[(optim, "_decayed", _adapted_without_decay)],
    ),
    Mutant(
        name="LAMB clips with 1e-6",
        difference="35b",
        what="LAMB clips by max / (norm + 1e-6), as torch's clip_grad_norm_",
        patches=[(optim, "_clip", lambda config: optim.clip_by_global_norm(config.clip_norm))],
    ),
    Mutant(
        name="head at the backbone's rate",
        difference="35c",
        what="the learning rate of the last linear layer is that of the others",
        patches=[(optim, "_scale_head", lambda factor: optax.identity())],
    ),
    Mutant(
        name="decay of norms for biases too",
        difference="35d",
        what="the weight decay of BatchNorm is that of all biases as well",
        patches=[
            (optim, "_norms", lambda tree: jax.tree.map(lambda x: x.ndim < 2, tree)),
            (optim, "_others", lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        ],
    ),
    Mutant(
        name="averaged buffers",
        difference="28d",
        what="running statistics are averaged too instead of copied",
        patches=[(steps, "apply_gradients", _averaged_buffers)],
    ),
]
