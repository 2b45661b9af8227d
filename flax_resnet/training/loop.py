"""The training loop: steps, and after every epoch validation, logs and a checkpoint."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.config import to_dict
from flax_resnet.devices import distributed
from flax_resnet.training import guard, optim, selection
from flax_resnet.training.evaluation import evaluate_split
from flax_resnet.training.progress import Interrupted
from flax_resnet.training.setup import Run

_IN_FLIGHT = 4
"""Dispatches in flight at most; more would only use memory and delay a stop."""

_LOGGED = ("loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro")


def train(*runs: Run):
    """Train every run until its last epoch, or until early stopping ends it.

    Several runs take their steps together, in one program. A run that has done fewer steps than the
    others, because its last checkpoint was older, first catches up; one that has stopped early
    leaves the others.

    Raises:
      NonFiniteLoss: more steps in a row than the config allows were not finite.
      Interrupted: a signal asked the runs to stop; they are saved.
    """
    for run in runs:
        run.saveable = run.progress
    _start_display(runs)
    while going := [run for run in runs if _goes_on(run)]:
        fewest = min(run.global_step for run in going)
        together = [run for run in going if run.global_step == fewest]
        if ended := [run for run in together if _ends_epoch(run)]:
            for run in ended:
                finish_epoch(run)
        elif advance(together):
            stop_if_asked(*runs)
    for run in runs:
        if run.profiler.left:
            run.display.warn([f"`profile`: {run.profiler.left} steps too few were left to trace"])
    runs[0].display.stop()


def _start_display(runs: Sequence[Run]):
    """Start the display of each run; that of the first shows the course of all."""
    config, steps_per_epoch = runs[0].config, runs[0].steps_per_epoch
    for run in runs:
        run.display.start(
            total_steps=config.epochs * steps_per_epoch,
            done_steps=run.global_step,
            batch_size=config.batch_size * len(runs),
            silent=run is not runs[0],
        )


def _goes_on(run: Run) -> bool:
    return run.progress.epoch < run.config.epochs and not run.progress.stopped_early


def _ends_epoch(run: Run) -> bool:
    return run.progress.step_in_epoch == run.steps_per_epoch


def advance(runs: Sequence[Run]) -> bool:
    """Take the next steps of runs that have done equally many; whether they are logged now."""
    start, first = time.monotonic(), runs[0]
    count = _steps_at_once(first)
    batches = [_next_batches(run, count) for run in runs]
    with first.profiler.dispatch(first.global_step, count, first.in_flight):
        _dispatch(runs, count, batches)
    for run in runs:
        run.progress.step_in_epoch += count
        jax.block_until_ready(run.in_flight[:-_IN_FLIGHT][-1:])
        run.checkpoints.check()
    logged = at_log_step(first, count) or bool(first.signum and not first.engine.several)
    if logged:
        for run in runs:
            log_steps(run)
    seconds = time.monotonic() - start
    for run in runs:
        run.progress.seconds += seconds
    return logged


def _dispatch(runs: Sequence[Run], count: int, batches: Sequence):
    """Start the next steps: those of several runs in one program."""
    first, *others = runs
    states = tuple(run.state for run in runs)
    if others:
        seeds = np.array([run.config.seed for run in runs], np.int32)
        together = first.member_fns[count]
        states, metrics = together(states, first.resident, tuple(batches), seeds)
    else:
        state, found = first.train_fns[count](first.state, first.resident, batches[0])
        states, metrics = (state,), (found,)
    for run, state, found in zip(runs, states, metrics, strict=True):
        run.state = state
        run.in_flight.append(found)


def _steps_at_once(run: Run) -> int:
    left = run.steps_per_epoch - run.progress.step_in_epoch
    return run.steps_per_dispatch if left >= run.steps_per_dispatch else 1


def _next_batches(run: Run, count: int):
    """The batches of the next dispatch, on the devices."""
    start = time.monotonic()
    batches = [next(run.batches) for _ in range(count)]
    run.progress.data_wait += time.monotonic() - start
    if run.resident:
        batches = [{"index": indices} for indices in batches]
    return run.engine.shard(batches)


def at_log_step(run: Run, count: int) -> bool:
    """True if the last `count` steps passed a multiple of `log_steps`, or ended the epoch."""
    step, every = run.progress.step_in_epoch, run.config.log_steps
    return step // every != (step - count) // every or step == run.steps_per_epoch


def log_steps(run: Run):
    """Fetch the metrics of all steps in flight and log the last; stop if they are not finite."""
    progress, step = run.progress, run.global_step
    fetched = [run.engine.fetch_metrics(metrics) for metrics in run.in_flight]
    run.in_flight = []
    rows = [
        {name: values[i] for name, values in metrics.items()}
        for metrics in fetched
        for i in range(len(metrics["loss"]))
    ]
    fault, progress.bad_steps = guard.first_fault(
        rows, progress.bad_steps, run.config.skip_nonfinite
    )
    finite = [row for row in rows[:fault] if row["finite"]]
    run.last_finite = finite[-1] if finite else run.last_finite
    if fault is not None:
        saved, place = run.checkpoints.latest(), run.directory.path
        raise guard.fault_of_step(step - len(rows) + fault + 1, run.last_finite, saved, place)
    for row in rows:
        progress.count(row)
    last = {name: float(value) for name, value in rows[-1].items()}
    progress.learning_rate = last["learning_rate"]
    run.directory.log_step(step, last)
    run.notify("step", last)
    run.display.step(
        step=step,
        epoch=progress.epoch + 1,
        epochs=run.config.epochs,
        loss=last["loss"],
        accuracy=last["accuracy"],
    )


def stop_if_asked(*runs: Run):
    """Save and raise `Interrupted` in all processes if a signal has reached one of them."""
    signum = distributed.agreed_signal(runs[0].signum)
    if signum:
        for run in runs:
            if run.in_flight:  # it has done other steps than those that were logged
                log_steps(run)
            save(run, improvement=False)
            run.checkpoints.wait()
        raise Interrupted(signum)


def finish_epoch(run: Run):
    """Validate, decide whether to stop, log and save."""
    config, progress = run.config, run.progress
    run.saveable = dataclasses.replace(progress)  # until the epoch is logged
    if not progress.counted_steps:
        raise guard.fault_of_epoch(progress.epoch + 1)
    row, timing = _rows(run)
    progress.next_epoch()
    improvement = len(run.dataset.validation) > 0 and _validate(run, row)
    last = progress.epoch == config.epochs or progress.stopped_early
    run.saveable = None  # its tables are ahead of it
    run.directory.log_epoch(row["step"], row, timing)
    run.display.epoch(row, timing, config.epochs)
    run.checkpoint_seconds = 0.0
    if improvement or last or progress.epoch % config.checkpoint_epochs == 0:
        save(run, improvement=improvement)
    run.saveable = progress
    run.notify("epoch", row | timing)


def _rows(run: Run) -> tuple[dict, dict]:
    """The row of metrics.csv and that of timings.csv for the epoch that has ended."""
    progress = run.progress
    timed = run.steps_per_epoch - progress.converted_steps
    row = {
        "epoch": progress.epoch + 1,
        "step": run.global_step,
        "learning_rate": progress.learning_rate,
        "train_loss": progress.loss_sum / progress.counted_steps,
        "train_accuracy": progress.accuracy_sum / progress.counted_steps,
    }
    timing = {
        "epoch": progress.epoch + 1,
        "steps": timed,
        "seconds": progress.seconds,
        "images_per_second": timed * run.config.batch_size / progress.seconds,
        "data_wait_seconds": progress.data_wait,
        "checkpoint_seconds": run.checkpoint_seconds,
    }
    return row, timing


def _validate(run: Run, row: dict) -> bool:
    """Add the validation to the row; whether this epoch is the best so far."""
    config, progress = run.config, run.progress
    values, *_ = evaluate_split(run, "validation")
    row |= {f"validation_{name}": values[name] for name in _LOGGED}
    watched = row[config.early_stopping.monitor]
    progress.selection = selection.update(
        progress.selection, watched, progress.epoch, config.early_stopping
    )
    progress.stopped_early = progress.selection.should_stop(config.early_stopping.patience)
    if config.schedule.schedule == "plateau":
        _cut_on_plateau(run, watched)
    return progress.selection.best_epoch == progress.epoch


def _cut_on_plateau(run: Run, watched: float):
    config = run.config
    accumulate, lr = config.optimizer.accumulate_steps, config.optimizer.lr
    update, an_epoch = run.global_step // accumulate, run.steps_per_epoch / accumulate
    warmth = optim.warmth(config.schedule, update, an_epoch)
    run.progress.plateau = optim.plateau(
        run.progress.plateau, watched, config.schedule, lr, config.early_stopping.mode, warmth
    )
    scale = jnp.asarray(run.progress.plateau.lr / lr, run.state.lr_scale.dtype)
    run.state = run.state._replace(lr_scale=run.engine.replicate(scale))


def save(run: Run, *, improvement: bool):
    """Write a checkpoint of the state, in the background."""
    run.directory.check()
    document = {
        "progress": dataclasses.asdict(run.progress),
        "num_devices": len(run.engine.devices),
        "config": to_dict(run.config),
        "class_names": list(run.dataset.class_names),
        "contents": run.contents,
        "channels": run.dataset.channels,
        "tables": run.directory.marks(),
        "improvement": improvement,
    }
    start = time.monotonic()
    state = run.engine.single(run.state)
    run.checkpoints.save(run.global_step, state, document, improvement=improvement)
    run.checkpoint_seconds += time.monotonic() - start


def rescue(run: Run, error: Exception) -> bool:
    """Save what a failure within the training would lose; whether it is saved."""
    if run.saveable is None or isinstance(error, distributed.CollectiveError) or run.engine.several:
        return getattr(error, "saved", False)
    try:
        if run.in_flight:
            log_steps(run)
        run.progress = run.saveable
        save(run, improvement=False)
        run.checkpoints.wait()
        return True
    except Exception:  # the first error is the one to tell
        return False
