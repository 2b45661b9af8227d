"""Optimizers and schedules: Optax, put together so that the numbers are torch.optim's.

Where the two differ, PyTorch's definition is taken and the difference named on the spot. All rules
end by multiplying with the learning rate, so schedules and plateau cuts act outside of them.
"""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from flax_resnet.config import INT32, OptimizerConfig, ScheduleConfig


def make_optimizer(
    config: OptimizerConfig, *, learning_rate=0.0, momentum=None
) -> optax.GradientTransformation:
    """The whole update: clip, decay, direction, learning rate.

    Args:
      learning_rate: scalar; may be traced, so that a schedule's value goes in at every step. The
        shape of the optimizer's state does not depend on it.
      momentum: scalar that replaces `config.momentum` (and Adam's beta1), for cycled momentum.
    """
    decay = _decay(config)
    decoupled = config.optimizer in ("adamw", "lamb") or config.decoupled_weight_decay
    direction = _direction(config, momentum)
    parts = [direction, *decay] if decoupled else [*decay, direction]
    if config.optimizer == "lamb":
        parts.append(optax.masked(optax.scale_by_trust_ratio(), _decayed(config)))
    clip = [_clip(config)] if config.clip_norm else []
    head = [_scale_head(config.head_lr / config.lr)] if config.head_lr else []
    return optax.chain(*clip, *parts, optax.scale_by_learning_rate(learning_rate), *head)


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    # timm's LAMB clips by max / norm, as Optax does.
    lamb = config.optimizer == "lamb"
    return (optax.clip_by_global_norm if lamb else clip_by_global_norm)(config.clip_norm)


def _scale_head(factor: float) -> optax.GradientTransformation:
    """Multiply the updates of the last linear layer."""

    def scale(updates, params):
        del params
        return updates | {"fc": jax.tree.map(lambda u: u * factor, updates["fc"])}

    return optax.stateless(scale)


def accumulate(optimizer: optax.GradientTransformation, steps: int, dtype) -> optax.MultiSteps:
    """Apply `optimizer` to the mean of `steps` gradients, every `steps` calls."""
    return optax.MultiSteps(optimizer, steps, accumulator_dtype=dtype)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch's clip_grad_norm_: g * min(1, max / (norm + 1e-6)); Optax has no 1e-6."""

    def clip(updates, params):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(clip)


def _direction(config: OptimizerConfig, momentum) -> optax.GradientTransformation:
    """The update before the learning rate and decoupled decay."""
    beta1 = config.beta1 if momentum is None else momentum
    momentum = config.momentum if momentum is None else momentum
    if config.optimizer in ("adam", "adamw", "lamb"):
        return optax.scale_by_adam(beta1, config.beta2, config.eps)
    if config.optimizer == "rmsprop":
        # eps outside the root, and momentum before the learning rate: optax.rmsprop has both
        # the other way round, which shows once the learning rate changes.
        scale = optax.scale_by_stddev if config.centered else optax.scale_by_rms
        scaled = scale(config.alpha, config.eps, eps_in_sqrt=False)
        return optax.chain(scaled, optax.trace(momentum)) if config.momentum else scaled
    return optax.trace(momentum, config.nesterov) if config.momentum else optax.identity()


def _decay(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """The weight decay of BatchNorm's parameters, if it differs, and of the others."""
    if config.norm_weight_decay is None:
        return [optax.add_decayed_weights(config.weight_decay, mask=_decay_mask(config))]
    return [
        optax.add_decayed_weights(config.norm_weight_decay, mask=_norms),
        optax.add_decayed_weights(config.weight_decay, mask=_others),
    ]


def _decayed(config: OptimizerConfig):
    """Parameters -> which of them decay; timm's LAMB adapts the rate of these alone."""

    def decayed(params):
        if config.norm_weight_decay is None:
            decays = _decay_mask(config) or _all
            return jax.tree.map(lambda it: it and config.weight_decay > 0, decays(params))
        norm, other = config.norm_weight_decay > 0, config.weight_decay > 0
        return jax.tree.map(lambda is_norm: norm if is_norm else other, _norms(params))

    return decayed


def _all(tree) -> dict:
    return jax.tree.map(lambda leaf: True, tree)


def _norms(tree) -> dict:
    """True for each leaf of a BatchNorm, which alone has a scale."""
    return {k: _norms(v) if isinstance(v, dict) else "scale" in tree for k, v in tree.items()}


def _others(tree) -> dict:
    return jax.tree.map(lambda is_norm: not is_norm, _norms(tree))


def _decay_mask(config: OptimizerConfig):
    if config.decay_norm_and_bias:
        return None
    return lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_schedule(config: ScheduleConfig, lr: float, updates_per_epoch: float, epochs: int):
    """Update number (from 0) -> learning rate, as torch.optim.lr_scheduler with a step() after
    every update; with a warm-up, as SequentialLR of LinearLR and the schedule.

    "plateau" is constant here: its cuts depend on the validation (`plateau`).
    """
    if config.schedule_per == "epoch":
        of_epoch = make_schedule(replace(config, schedule_per="update"), lr, 1, epochs)
        return lambda step: of_epoch(_epoch(step, updates_per_epoch))
    warmup = _in_updates(config.warmup_epochs, updates_per_epoch)
    before = 0 if config.warmup_within else warmup
    total = max(1, round(epochs * updates_per_epoch) - before)
    main = _main_schedule(config, lr, updates_per_epoch, total)
    if not warmup:
        return main
    # torch's OneCycleLR sets the rate that a warm-up before it leads to.
    top = lr / config.div_factor if config.schedule == "onecycle" else lr

    def schedule(step):
        ramp = _ramp(config, _float(step) / warmup)
        return jnp.where(step < warmup, top * ramp, main(jnp.maximum(step - before, 0)))

    return schedule


def _epoch(step, updates_per_epoch: float):
    """The epoch, from 0, in which an update is; the rounding of a quotient changes nothing."""
    return jnp.floor((_float(step) + 1e-3) / updates_per_epoch).astype(jnp.int32)


def _in_updates(epochs, updates_per_epoch) -> int:
    """The number of updates in so many epochs, at most INT32: no run ends later."""
    return min(round(epochs * updates_per_epoch), INT32)


def _ramp(config, share):
    return config.warmup_factor + (1 - config.warmup_factor) * share


def warmth(config: ScheduleConfig, update: int, updates_per_epoch: float) -> float:
    """Warm-up multiplier of the learning rate at `update`; 1 after the warm-up."""
    if config.schedule_per == "epoch":
        update, updates_per_epoch = int(_epoch(update, updates_per_epoch)), 1
    warmup = _in_updates(config.warmup_epochs, updates_per_epoch)
    return _ramp(config, update / warmup) if update < warmup else 1.0


def make_momentum_schedule(config: ScheduleConfig, updates_per_epoch: float, epochs: int):
    """Update number -> momentum of torch's OneCycleLR (0.95 to 0.85 and back), or None."""
    if config.schedule != "onecycle" or not config.cycle_momentum:
        return None
    if config.schedule_per == "epoch":
        of_epoch = make_momentum_schedule(replace(config, schedule_per="update"), 1, epochs)
        return lambda step: of_epoch(_epoch(step, updates_per_epoch))
    warmup = _in_updates(config.warmup_epochs, updates_per_epoch)
    total = max(1, round(epochs * updates_per_epoch) - warmup)
    cycle = _one_cycle(0.95, 0.85, 0.95, config.pct_start, total)
    return lambda step: cycle(jnp.maximum(step - warmup, 0))


def _main_schedule(config, lr, updates_per_epoch, total):
    if config.schedule == "step":
        length = max(1, _in_updates(config.step_epochs, updates_per_epoch))
        return lambda step: lr * config.gamma ** _float(step // length)
    if config.schedule == "multistep":
        milestones = [max(1, _in_updates(m, updates_per_epoch)) for m in config.milestones]
        return lambda step: lr * config.gamma ** _float(sum(step >= m for m in milestones))
    if config.schedule == "cosine":
        # Rises again after the end, as torch's; Optax's stays down.
        wave = lambda step: (1 + jnp.cos(jnp.pi * _float(step) / total)) / 2  # noqa: E731
        return lambda step: config.min_lr + (lr - config.min_lr) * wave(step)
    if config.schedule == "onecycle":
        initial = lr / config.div_factor
        return _one_cycle(initial, lr, initial / config.final_div_factor, config.pct_start, total)
    return lambda step: jnp.full_like(_float(step), lr)


def _one_cycle(start, middle, end, pct_start, total):
    """Cosine from start to middle to end. torch's phases end at pct * N - 1 and N - 1, Optax's
    one step later, so that Optax never reaches the end."""
    peak, last = pct_start * total - 1, total - 1

    def anneal(low, high, fraction):
        return high + (low - high) / 2 * (1 + jnp.cos(jnp.pi * fraction))

    def cycle(step):
        step = jnp.minimum(_float(step), total)  # torch allows one step past the end
        rise = anneal(start, middle, step / peak if peak else 1.0)
        fall = anneal(middle, end, (step - peak) / (last - peak) if last > peak else 1.0)
        return jnp.where(step <= peak, rise, fall)

    return cycle


def _float(step):
    return jnp.asarray(step).astype(jnp.result_type(float))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
    """State of the plateau schedule between two epochs; plain numbers, as in JSON."""

    best: float | None = None
    """Best value so far."""

    bad_epochs: int = 0
    """Epochs since then, without those of a cooldown."""

    cooldown: int = 0
    """Epochs for which bad ones do not count."""

    lr: float | None = None
    """Learning rate in force, without the factor of a warm-up; None: that at the start."""


def plateau(
    state: Plateau, value: float, config: ScheduleConfig, lr: float, mode: str, warmth: float = 1.0
) -> Plateau:
    """torch's ReduceLROnPlateau, once an epoch.

    Cuts when `bad > patience` (Optax's at `==`, one epoch earlier), and only by more than 1e-8;
    this and min_lr are of the rate in force, which a warm-up has brought to its `warmth`.

    Args:
      value: the watched value; `mode` says whether less ("min") or more ("max") is better.
      lr: learning rate at the start.
      warmth: `warmth` of the next update.
    """
    best, bad, cooldown = state.best, state.bad_epochs, state.cooldown
    current = lr if state.lr is None else state.lr
    sign = 1 if mode == "min" else -1
    start = sign * float("inf")  # which an infinite loss does not beat
    threshold = start if best is None else best * (1 - sign * config.plateau_threshold)
    if sign * value < sign * threshold:  # never of NaN
        best, bad = value, 0
    else:
        bad += 1
    if cooldown > 0:
        cooldown, bad = cooldown - 1, 0
    if bad > config.plateau_patience:
        reduced = max(current * config.gamma, config.min_lr / warmth)
        current = reduced if (current - reduced) * warmth > 1e-8 else current
        cooldown, bad = config.plateau_cooldown, 0
    return Plateau(best=best, bad_epochs=bad, cooldown=cooldown, lr=current)
