"""The files of a run: lock, config.json, metrics.csv, timings.csv, TensorBoard, report.json."""

import csv
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from flax_resnet import metrics
from flax_resnet.config import InputError, TrainConfig, from_dict, to_dict


class RunDirectory:
    """Owns a directory while it lives: a second process is refused, a dead one leaves no lock."""

    def __init__(self, path: Path | str, *, resume=False, overwrite=False):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is not a directory")
        if self.path.exists() and any(self.path.iterdir()) and not (resume or overwrite):
            raise InputError(
                f"{self.path} exists: continue it with --resume, or replace it with --overwrite"
            )
        if not _is_run_or_empty(self.path):
            raise InputError(f"{self.path} is no run, which --resume or --overwrite would lose")
        created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        if overwrite and not resume and not created:
            self._clear()
        self._writer = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: the report is written last."""
        return (self.path / "report.json").exists()

    def write_config(self, config: TrainConfig):
        """config.json, which --config reads."""
        _write(self.path / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    def start_logs(self, after_epoch: int, after_step: int):
        """Cut rows and events later than the checkpoint that the run goes on from."""
        for name in ("metrics.csv", "timings.csv"):
            rows = [row for row in read_rows(self.path / name) if row["epoch"] <= after_epoch]
            _write_rows(self.path / name, rows)
        self._writer = _summary_writer(self.path, after_step + 1)

    def log_step(self, step: int, values: dict):
        """Scalars of one step, for TensorBoard alone."""
        for name, value in values.items():
            self._writer.add_scalar(f"step/{name}", value, step)

    def log_epoch(self, step: int, row: dict, timing: dict):
        """One row of metrics.csv (numbers that a resumed run repeats) and one of timings.csv."""
        for name, new in (("metrics.csv", row), ("timings.csv", timing)):
            _write_rows(self.path / name, [*read_rows(self.path / name), new])
        for name, value in (row | timing).items():
            self._writer.add_scalar(f"epoch/{name}", value, step)
        self._writer.flush()

    def rows(self) -> list[dict]:
        """metrics.csv so far."""
        return read_rows(self.path / "metrics.csv")

    def timings(self) -> list[dict]:
        """timings.csv so far."""
        return read_rows(self.path / "timings.csv")

    def write_results(self, report: dict, confusion: np.ndarray, class_names):
        """per_class.csv, the pictures and, last, report.json."""
        from flax_resnet import plots  # Matplotlib's start would delay the first step

        write_per_class(self.path / "per_class.csv", confusion, class_names)
        plots.curves(self.path / "curves.png", self.rows(), report["best_epoch"])
        plots.confusion_matrix(self.path / "confusion_matrix.png", confusion, class_names)
        _write(self.path / "report.json", json.dumps(report, indent=2) + "\n")

    def close(self):
        """Give up the lock."""
        if self._writer is not None:
            self._writer.close()
        self._lock.close()

    def _clear(self):
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == "config.json"):
            if (
                entry.name != _LOCK
            ):  # config.json last: what is left is a run as long as it is there
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


class SharedDirectory(RunDirectory):
    """The run directory as the other processes of a run have it: the first writes for all."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not (self.path / _LOCK).exists():
            raise InputError(f"{self.path} is not on a file system that all processes share")

    def _nothing(self, *_, **__):
        pass

    write_config = start_logs = log_step = log_epoch = write_results = close = _nothing


def _is_run_or_empty(path: Path) -> bool:
    """Whether nothing is lost but a run. One that died early has its lock and an
    unfinished config.json at most."""
    if not path.exists() or (path / "config.json").exists():
        return True
    return {entry.name for entry in path.iterdir()} <= {_LOCK, "config.tmp"}


def _summary_writer(path: Path, purge_step: int):
    """tensorboardX imports torch where it finds it, for seconds, and needs none of it here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(str(path), purge_step=purge_step)


_LOCK = "run.lock"


def _lock(directory: Path):
    """The kernel drops the lock with the process, so a stale one cannot be left behind."""
    file = (directory / _LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        raise InputError(f"{directory} is in use by a running process (pid {owner})") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def read_config(run_dir: Path | str) -> TrainConfig:
    """The config of a run, as it was resolved.

    Raises:
      InputError: there is no run there, or its config does not decode.
    """
    return config_from_file(Path(run_dir) / "config.json")


def config_from_file(path: Path | str) -> TrainConfig:
    """A config from a JSON file, strictly: every key known, every value of its type."""
    path = Path(path)
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    try:
        return from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def write_per_class(path: Path, confusion: np.ndarray, class_names):
    """precision, recall, F1 and support of every class."""
    scores = metrics.per_class(confusion)
    rows = [
        {"class": name, **{key: values[i].item() for key, values in scores.items()}}
        for i, name in enumerate(class_names)
    ]
    _write_rows(path, rows)


def read_rows(path: Path) -> list[dict]:
    """A CSV of numbers -> rows; [] where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text):
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _write_rows(path, rows):
    if not rows:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _write(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
