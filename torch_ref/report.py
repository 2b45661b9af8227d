"""The end of a run: the chosen weights on every split."""

import math
import statistics

from torch_ref import environment
from torch_ref.evaluation import evaluate
from torch_ref.guard import NonFiniteLoss
from torch_ref.setup import Run


def report(run: Run, command: str = "") -> dict:
    """Load the chosen weights into the network and evaluate them on every split.

    Args:
      command: how the run was called.

    Returns:
      What report.json holds.

    Raises:
      NonFiniteLoss: the loss of a split is NaN or infinite.
    """
    restored = run.best if run.config.early_stopping.restore_best else None
    run.model.load_state_dict(restored or run.evaluated.state_dict())
    splits = {
        name: evaluate(run.model, batches, run.device, run.dtype)
        for name, batches in run.splits.items()
    }
    for name, scores in splits.items():
        if not math.isfinite(scores["loss"]):
            raise NonFiniteLoss(f"the {name} loss of the chosen weights is {scores['loss']}")
    images = len(run.batches) * run.config.batch_size
    return {
        "splits": splits,
        "epochs": run.epoch,
        "best_epoch": run.selection.best_epoch or run.epoch,
        "stopped_early": run.stopped_early,
        "seconds": sum(run.seconds),  # of training; speed without the first epoch, which warms up
        "images_per_second": images / statistics.fmean(run.seconds[1:] or run.seconds),
        "environment": environment.describe(run.device),
        "command": command,
    }
