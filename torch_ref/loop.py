"""The training loop: steps, and after every epoch validation and logs."""

import time
from pathlib import Path

import torch
from torch import Tensor

from torch_ref import selection
from torch_ref.directory import write_metrics
from torch_ref.evaluation import evaluate
from torch_ref.guard import check_epoch
from torch_ref.optim import take_average, take_statistics
from torch_ref.resume import save_state
from torch_ref.setup import Run
from torch_ref.steps import prepare_batch, train_step


def train(run: Run, run_dir: Path | None = None) -> None:
    """Train until the last epoch, or until early stopping ends the run.

    Args:
      run_dir: where metrics.csv and state.pth are written after every epoch; None keeps nothing.

    Raises:
      NonFiniteLoss: names the step.
    """
    while run.epoch < run.config.epochs and not run.stopped_early:
        start, first_step = time.perf_counter(), run.epoch * len(run.batches)
        run.model.train()
        losses = []
        for step, (images, labels) in enumerate(run.batches, first_step):
            learning_rate = run.optimizer.param_groups[0]["lr"]
            losses.append(take_step(run, images, labels, step))
        if run.ema:
            take_statistics(run.ema, run.model)
        losses = torch.stack(losses).cpu()  # the only wait for the device
        check_epoch(run.model, losses, first_step)
        run.seconds.append(time.perf_counter() - start)
        run.epoch += 1
        row = {"epoch": run.epoch, "learning_rate": learning_rate}
        finish_epoch(run, row | {"train_loss": losses.mean().item()}, run_dir)


def take_step(run: Run, images: Tensor, labels: Tensor, step: int) -> Tensor:
    """Everything that one batch changes. Returns the loss, still on the device."""
    config, dtype = run.config.optimizer, run.dtype
    batch = prepare_batch(images, labels, run.device, dtype, run.mix)
    weights = run.class_weights
    loss = train_step(
        run.model, run.optimizer, *batch, config, dtype=dtype, step=step, class_weights=weights
    )
    if (step + 1) % config.accumulate_steps == 0:
        run.scheduler.step()
        if run.ema:
            take_average(run.ema, run.model, config, step // config.accumulate_steps, run.copied)
    return loss


def finish_epoch(run: Run, row: dict, run_dir: Path | None) -> None:
    """Validate, decide whether to stop, log and save."""
    if "validation" in run.splits:
        scores = evaluate(run.evaluated, run.splits["validation"], run.device, run.dtype)
        row |= {f"validation_{name}": score for name, score in scores.items()}
        _select(run, row[run.config.early_stopping.monitor])
    _say_epoch(row, run.config.epochs)
    run.rows.append(row)
    if run_dir:
        write_metrics(run_dir, run.rows)
        save_state(run, run_dir)


def _select(run: Run, watched: float) -> None:
    stopping = run.config.early_stopping
    run.selection = selection.update(run.selection, watched, run.epoch, stopping)
    if run.selection.best_epoch == run.epoch:
        run.best = {k: v.clone() for k, v in run.evaluated.state_dict().items()}
    run.stopped_early = run.selection.should_stop(stopping.patience)
    if run.plateau:
        run.plateau.step(watched)


def _say_epoch(row: dict, epochs: int) -> None:
    shown = ("train_loss", "validation_loss", "validation_accuracy")
    figures = [f"{name} {row[name]:.4f}" for name in shown if name in row]
    print(f"epoch {row['epoch']:3d}/{epochs}", *figures, sep="  ", flush=True)
