"""The run directory: metrics.csv, report.json and weights.pth."""

import csv
import json
from pathlib import Path

from torch import nn

from flax_resnet.errors import InputError
from torch_ref import checkpoint

WEIGHTS = "weights.pth"


def check_usable(run_dir: Path) -> None:
    """Raises InputError for what is there already: a run is never written over."""
    if run_dir.exists():
        raise InputError(f"run directory {run_dir} exists already")


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
    (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
