"""The end of a run: the chosen weights on every split, and what is written of them."""

import math
import statistics

import numpy as np

from flax_resnet.data.prepare import SPLITS
from flax_resnet.devices import distributed
from flax_resnet.runs import environment
from flax_resnet.training import guard, sanity, steps
from flax_resnet.training.evaluation import evaluate_split
from flax_resnet.training.loop import stop_if_asked
from flax_resnet.training.network import Variables
from flax_resnet.training.setup import Run, abstract_state


def report(run: Run, command: str) -> dict:
    """Evaluate the chosen weights on every split and write the results.

    Args:
      command: how the run was called.

    Returns:
      What report.json holds; in processes other than the first its "splits" alone.

    Raises:
      NonFiniteLoss: a weight or a loss is not finite; there is no report then.
    """
    run.checkpoints.wait()
    variables, epoch = _chosen(run)
    splits, confusions, bins = {}, {}, {}
    for split in SPLITS:
        stop_if_asked(run)
        if len(getattr(run.dataset, split)):
            splits[split], confusions[split], bins[split] = evaluate_split(run, split, variables)
    _check(run, variables, splits, epoch)
    if not distributed.is_first():
        return {"splits": splits}
    warnings = sanity.of_results(splits, confusions, run.dataset.class_names)
    values = {
        "splits": splits,
        "warnings": warnings,
        "epochs": run.progress.epoch,
        "best_epoch": run.progress.selection.best_epoch or run.progress.epoch,
        "evaluated_epoch": epoch,
        "stopped_early": run.progress.stopped_early,
        **speed(run.directory.timings(), run.config.batch_size),
        "products": environment.products(run.config.model, run.engine.devices[0].platform),
        "left_out_images": len(run.dataset.bad_images),
        "command": command,
        "environment": environment.describe(len(run.engine.devices)),
    }
    last = list(splits)[-1]
    counts = {"confusion": confusions[last], "bins": bins[last]}
    run.directory.write_results(values, counts, run.dataset.class_names)
    run.directory.log_hparams(run.config, splits)
    run.display.results(splits, run.config.model.num_classes)
    run.display.warn(warnings)
    run.display.say(
        f"{values['seconds']:.0f} s of training, {values['images_per_second']:,.0f} images/s,"
        f" {values['data_wait_share']:.1%} of the time after the first epoch spent"
        f" waiting for data; {run.directory.path}"
    )
    run.notify("end", values)
    return values


def _chosen(run: Run) -> tuple[Variables, int]:
    """The best weights or, where these are not to be restored, the last; and their epoch."""
    if not (run.config.early_stopping.restore_best and run.progress.selection.best_epoch):
        state = run.engine.single(run.state)
        return steps.evaluation_variables(state), run.progress.epoch
    best = run.checkpoints.best()
    state = run.checkpoints.restore(best, run.engine.state_like(abstract_state(run)))
    return (
        steps.evaluation_variables(state),
        run.checkpoints.document(best)["progress"]["epoch"],
    )


def _check(run: Run, variables: Variables, splits: dict, epoch: int):
    faults = [f"the {s} loss" for s, values in splits.items() if not np.isfinite(values["loss"])]
    if not steps.is_finite(variables):
        faults.insert(0, "a weight")
    if faults:
        raise guard.fault_of_result(faults[0], epoch, run.directory.path)


def speed(timings: list[dict], batch_size: int) -> dict:
    """Seconds of training over all epochs, and the speed of a median epoch without the first.

    The first epoch compiles the program, as does the first one after each resume.

    Args:
      timings: rows of timings.csv.

    Returns:
      {"seconds", "images_per_second", "data_wait_share"}; the share is that of the time after the
      first epoch. NaN where no row is left.
    """
    steady = timings[1:] or timings
    seconds = sum(row["seconds"] for row in steady) or math.nan
    speeds = [row["steps"] * batch_size / (row["seconds"] or math.nan) for row in steady]
    return {
        "seconds": sum(row["seconds"] for row in timings),
        "images_per_second": statistics.median(speeds) if speeds else math.nan,
        "data_wait_share": sum(row["data_wait_seconds"] for row in steady) / seconds,
    }
