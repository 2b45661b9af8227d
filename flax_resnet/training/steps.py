"""The training and evaluation steps: pure functions, no I/O, no globals.

    train_step(state, batch) -> (state, metrics)        eval_step(variables, batch) -> sums

`train_step` is `prepare_batch`, `loss_and_gradients` and `apply_gradients`, one after the other.

A batch is {"image": uint8 [B, H, W, C], "label": int32 [B], "index": int32 [B]}; `index` is the
example's number in the data set, to which its k-th copy in a batch adds k times the number of
images. Random draws belong to the example: its key is
fold_in(seed, step, index), so the result does not depend on how many devices share a batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flax_resnet.config import INT32, TrainConfig
from flax_resnet.data import augment
from flax_resnet.metrics import BINS
from flax_resnet.training import losses, optim
from flax_resnet.training.network import Network, Preprocess, Variables, dtype_of, predict_logits

TOP_K = 5
_DROPOUT, _AUGMENT, _ERASE = range(3)  # purposes of an example's key
_MIXUP = 2**31  # in a step's key, where no example has this number


class TrainState(NamedTuple):
    """Everything that a step changes. Trees are nested dicts of arrays."""

    step: jax.Array
    """Batches seen, int32 []."""

    params: dict
    """Parameters that are trained."""

    frozen: dict
    """Parameters that are not trained."""

    batch_stats: dict
    """BatchNorm's running statistics."""

    opt_state: optax.OptState

    ema: dict
    """Moving average of params; {} when off."""

    lr_scale: jax.Array
    """Factor that the plateau schedule has brought the learning rate to, []."""


def make_state(variables: Variables, config: TrainConfig) -> TrainState:
    """The state before the first step. Every leaf is a copy: the step donates its input."""
    params = jax.tree.map(jnp.copy, variables.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=jax.tree.map(jnp.copy, variables.frozen),
        batch_stats=jax.tree.map(jnp.copy, variables.batch_stats),
        opt_state=_optimizer(config, 0.0, None, dtype_of(params)).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {},
        lr_scale=jnp.ones((), dtype_of(params)),
    )


def evaluation_variables(state: TrainState) -> Variables:
    """The variables to evaluate and export: averaged weights if there are any."""
    return Variables(state.ema or state.params, state.frozen, state.batch_stats)


@jax.jit
def is_finite(tree) -> jax.Array:
    """True if all numbers of all arrays are finite, bool []."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_train_step(
    network: Network,
    config: TrainConfig,
    preprocess: Preprocess,
    *,
    num_classes: int,
    steps_per_epoch: int,
    axis_name: str | None = None,
    gather: Callable[[dict], dict] = lambda params: params,
    class_weights: np.ndarray | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Make the training step, a pure function (state, batch) -> (state, metrics).

    Args:
      steps_per_epoch: batches in an epoch, from which schedules count their epochs.
      axis_name: axis over which the batch is split (`Engine.axis_name`), or None.
      gather: function from parameters as they are stored between steps to those of a forward pass.
      class_weights: weights of the classes in the loss, `[K]`.

    Returns:
      A function that also takes `seed`, a number that may be traced, instead of the config's. Its
      metrics are scalars of the global batch: loss (of the training objective
      without penalties), accuracy, gradient_norm, learning_rate, finite.
    """
    rates = _rates(config, steps_per_epoch)
    copied = _updates_without_average(config, steps_per_epoch)

    def train_step(state: TrainState, batch: dict, seed: jax.Array | int = config.seed):
        prepared = prepare_batch(
            state,
            batch,
            config,
            preprocess,
            num_classes=num_classes,
            axis_name=axis_name,
            class_weights=class_weights,
            seed=seed,
        )
        gradients, forward = loss_and_gradients(
            network, state, prepared, config, axis_name=axis_name, gather=gather
        )
        learning_rate, momentum = rates(state)
        new = apply_gradients(
            state, gradients, forward.batch_stats, config, learning_rate, momentum, copied
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(forward.loss)
        if config.skip_nonfinite:
            new = _unless_finite(finite, new, state)
        metrics = {
            "loss": forward.loss,
            "accuracy": forward.accuracy,
            "gradient_norm": norm,
            "learning_rate": learning_rate,
            "finite": finite,
        }
        return new, metrics

    return train_step


def _updates_without_average(config: TrainConfig, steps_per_epoch: int) -> int:
    """The number of updates after which the moving average begins; before, it is a copy."""
    if not config.optimizer.ema_after_warmup:
        return 0
    longest = INT32 - config.optimizer.ema_steps  # their sum is traced as an int32
    updates_per_epoch = steps_per_epoch / config.optimizer.accumulate_steps
    return min(round(config.schedule.warmup_epochs * updates_per_epoch), longest)


class PreparedBatch(NamedTuple):
    """A training batch as the network and the loss take it."""

    images: jax.Array
    """Augmented and normalised, `[B, H, W, C]`."""

    targets: jax.Array
    """Probabilities of the classes, `[B, K]`."""

    dropout_keys: jax.Array
    """One for each example, `[B]`."""

    class_weights: jax.Array | None = None
    """Factors of the targets in the loss, `[K]`."""


def prepare_batch(
    state: TrainState,
    batch: dict,
    config: TrainConfig,
    preprocess: Preprocess,
    *,
    num_classes: int,
    axis_name: str | None = None,
    class_weights: np.ndarray | None = None,
    seed: jax.Array | int | None = None,
) -> PreparedBatch:
    """Augment and normalise the images of a training batch, and smooth and mix its labels.

    Args:
      state: gives the number of the step, and the type of the parameters, which the images get.
      batch: image uint8 `[B, H, W, C]`, label int32 `[B]`, index int32 `[B]`.
      axis_name: as `make_train_step`; mixup pairs the images of all devices.
      class_weights: as `make_train_step`.
      seed: seed of the random numbers; None takes the config's.
    """
    key = jax.random.key(config.seed if seed is None else seed)
    key = jax.random.fold_in(key, state.step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
    dtype = dtype_of(state.params)
    images = preprocess.to_unit(batch["image"], dtype)
    images = augment.augment(
        _purpose(keys, _AUGMENT),
        images,
        config.augment,
        interpolation=config.data.interpolation,
        mean=preprocess.mean,
    )
    images = preprocess.normalize(images)
    if config.augment.random_erasing:
        rectangles = augment.draw_erasing(
            _purpose(keys, _ERASE), config.augment.random_erasing, *images.shape[1:3]
        )
        images = augment.erase(images, rectangles)
    smoothing = config.optimizer.label_smoothing
    targets = losses.soft_targets(batch["label"], num_classes, smoothing, dtype)
    mixes = config.augment.mixup or config.augment.cutmix
    weights = class_weights
    if weights is not None:
        weights = _class_factors(jnp.asarray(weights, dtype), batch["label"], mixes, axis_name)
    if mixes:
        mixing = jax.random.fold_in(key, _MIXUP)
        pixels, share = augment.draw_mix(mixing, config.augment, *images.shape[1:3])
        images = augment.mixup(images, pixels, axis_name=axis_name)
        targets = augment.mixup(targets, share, axis_name=axis_name)
    return PreparedBatch(images, targets, _purpose(keys, _DROPOUT), weights)


def _class_factors(weights, labels, mixed, axis_name):
    """The weights of the classes, `[K]`, divided by their mean over the batch: torch's loss for
    labels is a weighted mean. Of probabilities, which mixed labels are, torch takes a plain mean.
    """
    if mixed:
        return weights
    mean = weights[labels].mean()
    return weights / (lax.pmean(mean, axis_name) if axis_name is not None else mean)


class Forward(NamedTuple):
    """Results of a forward pass over a training batch, beside the gradients."""

    loss: jax.Array
    """Training loss without penalties, mean over the global batch, []."""

    accuracy: jax.Array
    """Share of the global batch whose most likely class is the target's, []."""

    batch_stats: dict
    """BatchNorm's running statistics after the batch."""


def loss_and_gradients(
    network: Network,
    state: TrainState,
    batch: PreparedBatch,
    config: TrainConfig,
    *,
    axis_name: str | None = None,
    gather: Callable[[dict], dict] = lambda params: params,
) -> tuple[dict, Forward]:
    """Run a batch forward and backward.

    Args:
      axis_name: as `make_train_step`.
      gather: as `make_train_step`.

    Returns:
      Gradients of the loss and its penalties, mean over the global batch, shaped as `state.params`.
    """

    def objective(params):
        variables = Variables(gather(params), gather(state.frozen), state.batch_stats)
        logits, stats = network.apply(
            variables, batch.images, train=True, dropout_keys=batch.dropout_keys
        )
        targets = batch.targets
        if batch.class_weights is not None:
            targets = targets * batch.class_weights[None]
        loss = losses.training_loss(logits, targets, config.optimizer).mean()
        penalty = config.optimizer.l1 * losses.l1_penalty(params) if config.optimizer.l1 else 0
        return loss + penalty, (loss, logits, stats)

    gradients, (loss, logits, stats) = jax.grad(objective, has_aux=True)(state.params)
    right = logits.argmax(-1) == batch.targets.argmax(-1)
    accuracy = right.mean(dtype=dtype_of(state.params))
    if axis_name is not None:
        sent = optax.tree.cast(gradients, config.parallel.reduce_dtype)
        sent, loss, accuracy = lax.pmean((sent, loss, accuracy), axis_name)
        gradients = jax.tree.map(lambda mean, own: mean.astype(own.dtype), sent, gradients)
        if config.model.batch_norm_images:
            stats = _mean_of_floats(stats, axis_name)
    return gradients, Forward(loss, accuracy, stats)


def _mean_of_floats(tree, axis_name):
    """The mean over devices; whole numbers, which are equal on all of them, stay as they are."""
    return jax.tree.map(
        lambda x: lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def apply_gradients(
    state: TrainState,
    gradients: dict,
    batch_stats: dict,
    config: TrainConfig,
    learning_rate: jax.Array | float,
    momentum: jax.Array | float | None = None,
    copied: int = 0,
) -> TrainState:
    """Return the state after one call of the optimizer, with a new average if the weights changed.

    Args:
      gradients: what `loss_and_gradients` returns.
      batch_stats: the new running statistics.
      learning_rate: the learning rate of this update, [].
      momentum: replaces the config's momentum if the schedule moves it, []; else None.
      copied: number of updates at the start after which the average is a copy of the weights.
    """
    optimizer = _optimizer(config, learning_rate, momentum, dtype_of(state.params))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state._replace(
        step=state.step + 1,
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if not config.optimizer.ema_decay:
        return new
    batches = _batches_taken(state, config.optimizer)
    return new._replace(ema=_moving_average(state.ema, params, batches, config.optimizer, copied))


def _rates(config: TrainConfig, steps_per_epoch: int):
    """State -> learning rate of its next update, and momentum where the schedule cycles it."""
    accumulate = config.optimizer.accumulate_steps
    updates_per_epoch = steps_per_epoch / accumulate
    schedule = optim.make_schedule(
        config.schedule, config.optimizer.lr, updates_per_epoch, config.epochs
    )
    cycle = optim.make_momentum_schedule(config.schedule, updates_per_epoch, config.epochs)

    def rates(state: TrainState):
        update, dtype = state.step // accumulate, dtype_of(state.params)
        momentum = cycle(update).astype(dtype) if cycle else None
        return schedule(update).astype(dtype) * state.lr_scale, momentum

    return rates


def make_eval_step(
    network: Network, preprocess: Preprocess, *, num_classes: int
) -> Callable[[Variables, dict], dict]:
    """Make the evaluation step (variables, batch) -> sums; "mask" [B] leaves out the padding.

    Returns:
      A function that returns loss, count and top5 (scalars), confusion `[K, K]` int32 with the
      true class as row, and bins `[3, metrics.BINS]`: images, hits and sum of the probabilities of
      the predictions whose probability is in each bin.
    """

    def eval_step(variables: Variables, batch: dict):
        logits = predict_logits(network, preprocess, variables, batch["image"])
        mask, labels = batch["mask"], batch["label"]
        targets = losses.soft_targets(labels, num_classes, 0.0, logits.dtype)
        each = losses.cross_entropy(logits, targets)
        hits = label_rank(logits, labels) < TOP_K
        confusion = jnp.zeros((num_classes, num_classes), jnp.int32)
        predicted, weight = logits.argmax(-1), mask.astype(jnp.int32)
        confusion = confusion.at[labels, predicted].add(weight)
        return {
            "loss": jnp.where(mask, each, 0).sum(),
            "count": mask.sum(),
            "top5": (hits & mask).sum(),
            "confusion": confusion,
            "bins": _bins(logits, predicted == labels, mask),
        }

    return eval_step


def _bins(logits, hits, mask):
    """The images, hits and sums of probabilities by the probability of the prediction."""
    probability = jnp.where(mask, jax.nn.softmax(logits).max(-1), 1)
    bins = jnp.clip(jnp.ceil(probability * BINS).astype(jnp.int32) - 1, 0, None)
    values = jnp.stack([jnp.ones_like(probability), hits.astype(probability.dtype), probability])
    # Sums of a product rather than a scatter, whose order of additions is open on a GPU.
    in_bin = jax.nn.one_hot(bins, BINS, dtype=logits.dtype)
    return (jnp.where(mask, values, 0)[:, :, None] * in_bin[None]).sum(1)


def label_rank(logits, labels):
    """Number of classes that `lax.top_k` would list before the label, `[B]`. `lax.top_k` itself
    would make the compiler gather the logits of all devices."""
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(-1)


def _batches_taken(state, config):
    """Number of batches accumulated so far, without those that were skipped."""
    if not isinstance(state.opt_state, optax.MultiStepsState):
        return state.step
    return state.opt_state.gradient_step * config.accumulate_steps + state.opt_state.mini_step


def _moving_average(ema, params, batches, config, copied=0):
    """torch's AveragedModel with get_ema_multi_avg_fn: the first update that enters copies the
    weights, and so do those of a warm-up, which restarts the average.

    Args:
      batches: number of batches taken before this one, [].
    """
    update = batches // config.accumulate_steps
    first = update < copied + config.ema_steps
    updated = (batches + 1) % config.accumulate_steps == 0
    updated &= update % config.ema_steps == 0
    decay = jnp.where(first, 0.0, config.ema_decay).astype(dtype_of(params))
    return jax.tree.map(
        lambda old, new: jnp.where(updated, decay * old + (1 - decay) * new, old),
        ema,
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
