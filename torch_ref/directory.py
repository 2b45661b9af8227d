"""The run directory: metrics.csv, state.pth, report.json and weights.pth."""

import contextlib
import csv
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from flax_resnet.config import finite
from flax_resnet.errors import InputError
from flax_resnet.text import say
from torch_ref import checkpoint

WEIGHTS = "weights.pth"
METRICS, REPORT, STATE = "metrics.csv", "report.json", "state.pth"
LOCK = "run.lock"
FILES = (METRICS, REPORT, STATE, WEIGHTS, LOCK, "metrics.tmp", "report.tmp", "state.tmp")
"""The names of all that a run writes into its directory."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, whose file then takes the place of `path`. A run that is killed
    before leaves it, and the next one writes over it."""
    temporary = path.with_suffix(".tmp")
    yield temporary
    os.replace(temporary, path)


def check_usable(run_dir: Path, *, resume: bool = False) -> None:
    """Raises InputError for what is there already: a run is never written over, and goes on only
    where nothing but its own files lies."""
    if not os.path.lexists(run_dir):
        return
    if not resume:
        raise InputError(f"run directory {run_dir} exists already; `resume` continues its run")
    if run_dir.is_symlink() or not run_dir.is_dir():
        raise InputError(f"{run_dir} is no directory of a run; move it")
    for entry in run_dir.iterdir():
        if entry.name not in FILES or entry.is_symlink() or not entry.is_file():
            raise InputError(f"{run_dir} holds {entry.name}, which no run has written; move it")
    if (run_dir / REPORT).exists() and not (run_dir / STATE).exists():
        raise InputError(f"{run_dir} has no {STATE} to go on from")


def check_apart(run_dir: Path, dataset: str) -> None:
    """Raises InputError for a run among its images, where its directory would be a class."""
    scheme, _, folder = dataset.partition(":")
    inside = os.path.realpath(run_dir).startswith(os.path.realpath(folder) + os.sep)
    if scheme == "folder" and inside:
        raise InputError(f"{run_dir} lies in {folder}, the folder of the images; give another one")


@contextlib.contextmanager
def locked(run_dir: Path, *, resume: bool = False) -> Iterator[None]:
    """Makes the directory and keeps it for this run within the context. A run that ends before it
    writes anything leaves no directory.

    Raises:
      InputError: another run has it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        raise InputError(f"run directory {run_dir} exists already") from None
    with open(run_dir / LOCK, "a") as file:
        _lock(file, run_dir)
        try:
            yield
        finally:
            if os.listdir(run_dir) == [LOCK]:
                os.unlink(run_dir / LOCK)
                run_dir.rmdir()


def _lock(file, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"run directory {run_dir} is in use by a running process") from None
    except OSError:
        say(f"{run_dir}: the file system has no locks; make sure that only one run uses it")


def write_metrics(run_dir: Path, rows: list[dict]) -> None:
    """metrics.csv, a row for each epoch."""
    with replacing(run_dir / METRICS) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def finished_report(run_dir: Path) -> dict | None:
    """The report of a finished run; None while it is under way."""
    path = run_dir / REPORT
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise InputError(f"{path}: damaged") from error


def write_results(run_dir: Path, model: nn.Module, report: dict) -> None:
    """The weights and the report of a finished run."""
    checkpoint.save(run_dir / WEIGHTS, checkpoint.to_arrays(model.state_dict()))
    text = json.dumps(finite(report), indent=2, allow_nan=False)
    with replacing(run_dir / REPORT) as path:
        path.write_text(text + "\n")
