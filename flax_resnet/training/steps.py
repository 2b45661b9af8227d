"""The training and evaluation steps: pure functions, no I/O, no globals.

    train_step(state, batch) -> (state, metrics)        eval_step(variables, batch) -> sums

A batch is {"image": uint8 [B, H, W, C], "label": int32 [B], "index": int32 [B]}; `index` is the
example's number in the data set. What is random belongs to the example: its key is
fold_in(seed, step, index), so the result does not depend on how many devices share a batch.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from flax_resnet.config import TrainConfig
from flax_resnet.data import augment
from flax_resnet.training import losses, optim

TOP_K = 5
_DROPOUT, _AUGMENT, _ERASE = range(3)  # purposes of an example's key
_MIXUP = 2**31  # in a step's key, where no example has this number


class TrainState(NamedTuple):
    """Everything that a step changes. Trees are nested dicts of arrays."""

    step: jax.Array
    """Batches seen, int32 []."""

    params: dict
    """What is trained."""

    frozen: dict
    """Parameters that are not."""

    batch_stats: dict
    """BatchNorm's running statistics."""

    opt_state: optax.OptState

    ema: dict
    """Moving average of params; {} when off."""

    lr_scale: jax.Array
    """Factor that the plateau schedule has brought the learning rate to, []."""


class Variables(NamedTuple):
    """What a forward pass needs."""

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


def make_state(variables: Variables, config: TrainConfig) -> TrainState:
    """The state before the first step. Every leaf is a copy: the step donates its input."""
    params = jax.tree.map(jnp.copy, variables.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=jax.tree.map(jnp.copy, variables.frozen),
        batch_stats=jax.tree.map(jnp.copy, variables.batch_stats),
        opt_state=_optimizer(config, 0.0, None, _dtype(params)).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {},
        lr_scale=jnp.ones((), _dtype(params)),
    )


def evaluation_variables(state: TrainState) -> Variables:
    """What is evaluated and exported: the averaged weights if there are any."""
    return Variables(state.ema or state.params, state.frozen, state.batch_stats)


@jax.jit
def is_finite(tree) -> jax.Array:
    """Whether all numbers of all arrays are finite, bool []."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_train_step(
    network: Network,
    config: TrainConfig,
    preprocess: Preprocess,
    *,
    num_classes: int,
    steps_per_epoch: int,
    axis_name: str | None = None,
    gather=lambda params: params,
):
    """The step as a pure function (state, batch) -> (state, metrics).

    Args:
      steps_per_epoch: batches an epoch; lengths of schedules are in epochs.
      axis_name: pmap axis over which the batch is split; None under jit, sharded or not.
      gather: parameters as they live between steps -> as a forward pass needs them.

    Returns:
      A function whose metrics are scalars of the global batch: loss (of the training objective
      without penalties), accuracy, gradient_norm, learning_rate, finite.
    """
    accumulate = config.optimizer.accumulate_steps
    updates_per_epoch = steps_per_epoch / accumulate
    lr = config.optimizer.lr
    schedule = optim.make_schedule(config.schedule, lr, updates_per_epoch, config.epochs)
    momentum_schedule = optim.make_momentum_schedule(
        config.schedule, updates_per_epoch, config.epochs
    )

    def train_step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        dtype = _dtype(state.params)
        images, targets = _augmented(
            key, keys, batch, config, preprocess, num_classes, dtype, axis_name
        )

        def objective(params):
            variables = Variables(gather(params), gather(state.frozen), state.batch_stats)
            dropout_keys = _purpose(keys, _DROPOUT)
            logits, stats = network.apply(variables, images, train=True, dropout_keys=dropout_keys)
            loss = losses.cross_entropy(logits, targets).mean()
            penalty = config.optimizer.l1 * losses.l1_penalty(params) if config.optimizer.l1 else 0
            return loss + penalty, (loss, logits, stats)

        gradients, (loss, logits, stats) = jax.grad(objective, has_aux=True)(state.params)
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean(dtype=dtype)
        if axis_name is not None:
            gradients, loss, accuracy = lax.pmean((gradients, loss, accuracy), axis_name)

        update = state.step // accumulate
        learning_rate = schedule(update).astype(dtype) * state.lr_scale
        momentum = momentum_schedule(update).astype(dtype) if momentum_schedule else None
        new = _update(state, gradients, stats, config, learning_rate, momentum)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if config.skip_nonfinite:
            new = _unless_finite(finite, new, state)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "finite": finite,
        }
        return new, metrics

    return train_step


def make_eval_step(network: Network, preprocess: Preprocess, *, num_classes: int):
    """(variables, batch) -> sums over the batch; "mask" [B] leaves out what only fills it up.

    Returns:
      A function that returns loss, count and top5 (scalars) and confusion `[K, K]` int32 with
      the true class as row.
    """

    def eval_step(variables: Variables, batch: dict):
        logits = predict_logits(network, preprocess, variables, batch["image"])
        mask, labels = batch["mask"], batch["label"]
        targets = losses.soft_targets(labels, num_classes, 0.0, logits.dtype)
        each = losses.cross_entropy(logits, targets)
        hits = _ahead(logits, labels) < TOP_K
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        confusion = confusion.at[labels, logits.argmax(-1)].add(mask.astype(jnp.int32))
        return {
            "loss": jnp.where(mask, each, 0).sum(),
            "count": mask.sum(),
            "top5": (hits & mask).sum(),
            "confusion": confusion,
        }

    return eval_step


def _ahead(logits, labels):
    """How many classes come before the true one, `[B]`: as `lax.top_k` orders them, which the
    compiler would only run on the logits of all devices brought together."""
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(-1)


def predict_logits(network: Network, preprocess: Preprocess, variables: Variables, images):
    """uint8 `[B, H, W, C]` -> logits `[B, K]` in evaluation mode, float32 or wider."""
    images = preprocess.to_unit(images, _dtype(variables.batch_stats or variables.params))
    logits, _ = network.apply(variables, preprocess.normalize(images), train=False)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _augmented(key, keys, batch, config, preprocess, num_classes, dtype, axis_name):
    """Normalised images `[B, H, W, C]` and targets `[B, K]` of a training batch."""
    images = preprocess.to_unit(batch["image"], dtype)
    images = augment.augment(_purpose(keys, _AUGMENT), images, config.augment)
    images = preprocess.normalize(images)
    if config.augment.random_erasing:
        rectangles = augment.draw_erasing(
            _purpose(keys, _ERASE), config.augment.random_erasing, *images.shape[1:3]
        )
        images = augment.erase(images, rectangles)
    smoothing = config.optimizer.label_smoothing
    targets = losses.soft_targets(batch["label"], num_classes, smoothing, dtype)
    if config.augment.mixup:
        lam = augment.draw_mixup(jax.random.fold_in(key, _MIXUP), config.augment.mixup)
        images = augment.mixup(images, lam, axis_name=axis_name)
        targets = augment.mixup(targets, lam, axis_name=axis_name)
    return images, targets


def _update(state, gradients, stats, config, learning_rate, momentum):
    """One call of the optimizer, and of the moving average where it changed the weights."""
    optimizer = _optimizer(config, learning_rate, momentum, _dtype(state.params))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(
        step=state.step + 1,
        params=params,
        batch_stats=stats,
        opt_state=opt_state,
    )
    if not config.optimizer.ema_decay:
        return new
    taken = state._replace(step=_batches_taken(state, config.optimizer))
    return new._replace(ema=_moving_average(taken, params, config.optimizer))


def _batches_taken(state, config):
    """Batches that went into updates: `MultiSteps` has not counted those that were skipped."""
    if not isinstance(state.opt_state, optax.MultiStepsState):
        return state.step
    return state.opt_state.gradient_step * config.accumulate_steps + state.opt_state.mini_step


def _moving_average(state, params, config):
    """torch's AveragedModel with get_ema_multi_avg_fn: the first update copies the weights."""
    accumulate = config.accumulate_steps
    first = state.step < accumulate
    updated = (state.step + 1) % accumulate == 0
    decay = jnp.where(first, 0.0, config.ema_decay).astype(_dtype(params))
    return jax.tree.map(
        lambda old, new: jnp.where(updated, decay * old + (1 - decay) * new, old),
        state.ema,
        params,
    )


def _unless_finite(finite, new, old):
    """The new state where the numbers are sound, else the old one: a batch is skipped."""
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    return kept._replace(step=new.step)


def _optimizer(config, learning_rate, momentum, dtype):
    optimizer = optim.make_optimizer(
        config.optimizer, learning_rate=learning_rate, momentum=momentum
    )
    steps = config.optimizer.accumulate_steps
    # Where batches are skipped the average needs a count of those that were not.
    counted = steps > 1 or (config.skip_nonfinite and config.optimizer.ema_decay)
    return optim.accumulate(optimizer, steps, dtype) if counted else optimizer


def _purpose(keys, purpose):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, purpose)


def _dtype(tree):
    floats = [x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return floats[0]
