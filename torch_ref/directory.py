"""The run directory: metrics.csv, report.json and weights.pth."""

import csv
import json
import os
from pathlib import Path

from torch import nn

from flax_resnet.config import finite
from flax_resnet.errors import InputError
from torch_ref import checkpoint

WEIGHTS = "weights.pth"
FILES = ("metrics.csv", "report.json", WEIGHTS)
"""The names of all that a run writes into its directory."""


def check_usable(run_dir: Path) -> None:
    """Raises InputError for what is there already: a run is never written over."""
    if run_dir.exists():
        raise InputError(f"run directory {run_dir} exists already")


def clear(run_dir: Path) -> None:
    """Deletes the directory of a run that was cut off; InputError, and nothing is deleted, where it
    holds anything that no run has written."""
    if not os.path.lexists(run_dir):
        return
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise InputError(f"{run_dir} is no directory of a run; move it")
    for entry in run_dir.iterdir():
        if entry.name not in FILES or entry.is_symlink() or not entry.is_file():
            raise InputError(f"{run_dir} holds {entry.name}, which no run has written; move it")
    for name in FILES:
        (run_dir / name).unlink(missing_ok=True)
    run_dir.rmdir()


def log_epoch(run_dir: Path, row: dict) -> None:
    """A row of metrics.csv."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "metrics.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def write_results(run_dir: Path, model: nn.Module, report: dict) -> None:
    """The weights and the report of a finished run."""
    checkpoint.save(run_dir / WEIGHTS, checkpoint.to_arrays(model.state_dict()))
    text = json.dumps(finite(report), indent=2, allow_nan=False)
    (run_dir / "report.json").write_text(text + "\n")
