"""Writes the files of a run: lock, config.json, tables, TensorBoard events, report.json."""

import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
from pathlib import Path

import numpy as np

from flax_resnet import metrics
from flax_resnet.config import TrainConfig, config_from_file, finite, flat, to_dict
from flax_resnet.devices.distributed import RunLost
from flax_resnet.errors import InputError
from flax_resnet.runs import tables
from flax_resnet.runs.checkpoint import check_place, steps_in
from flax_resnet.runs.owned import DIGESTS, LOCK, RESULTS, clear
from flax_resnet.runs.tables import Table
from flax_resnet.runs.views import (
    Say,
    is_begun,
    rows_of_an_earlier_version,
    warn,
)

TABLES = ("metrics.csv", "timings.csv")


class RunDirectory:
    """The directory of a run, locked until it is closed or the process ends; InputError if it is in
    use or `check_usable` refuses it."""

    def __init__(self, path: Path | str, *, resume=False, overwrite=False, say: Say = warn):
        self.path = Path(path)
        check_usable(self.path, resume=resume, overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path, say)
        # Another run may have ended here in the meantime.
        check_usable(self.path, resume=resume, overwrite=overwrite)
        if overwrite and not resume:
            clear(self.path)
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            raise InputError(f"{self.checkpoints} is not a directory")
        for name in (*TABLES, *RESULTS, "config.json", "report.json", DIGESTS):
            if (self.path / name).is_dir():
                raise InputError(f"{self.path / name} is a directory, not a file; move it")
        self._say, self._writer = say, None
        names = {name: (self.path / name, self.checkpoints / name) for name in TABLES}
        self._tables = {name: Table(*copies) for name, copies in names.items()}

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def check(self):
        """Raises RunLost if the directory is no longer the one that this run locked."""
        try:
            there = os.stat(self.path / LOCK)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._lock.fileno())):
            raise RunLost(
                f"{self.path} was moved, deleted or replaced while its run went on; the run ends"
            )

    def write_config(self, config: TrainConfig):
        """Write config.json."""
        content = as_json(to_dict(config))
        self._write_digests({"config.json": content})  # before the config, which makes it a run
        tables.write(self.path / "config.json", content)

    def start_logs(self, document: dict | None, after_step: int):
        """Restore the tables and TensorBoard events to their state at the checkpoint to resume
        from.

        Args:
          document: the checkpoint's document; None at the start of a run.
          after_step: the checkpoint's step.
        """
        self.check()
        self.checkpoints.mkdir(exist_ok=True)
        for name, table in self._tables.items():
            table.start(self._recovered(name, document) if document else b"")
        self._writer = _summary_writer(self.path, after_step + 1)

    def _recovered(self, name: str, document: dict) -> bytes:
        if "tables" not in document:
            rows = rows_of_an_earlier_version(self.path / name, document, self._say)
            return tables.as_csv(rows) if rows else b""
        content = self._tables[name].recover(document["tables"][name])
        if content is None:
            self._say(f"{self.path / name}: both copies are damaged; its rows so far are lost")
        return content or b""

    def marks(self) -> dict:
        """The marks of the tables, which a checkpoint stores."""
        return {name: table.mark() for name, table in self._tables.items()}

    def log_step(self, step: int, values: dict):
        """Write scalars of one step to TensorBoard."""
        self.check()
        for name, value in values.items():
            self._writer.add_scalar(f"step/{name}", value, step)

    def log_epoch(self, step: int, row: dict, timing: dict):
        """Append to metrics.csv (numbers that a resumed run repeats) and to timings.csv."""
        self.check()
        for table, new in zip(self._tables.values(), (row, timing), strict=True):
            table.append(new)
        for name, value in (row | timing).items():
            self._writer.add_scalar(f"epoch/{name}", value, step)
        self._writer.flush()

    def rows(self) -> list[dict]:
        """The rows of metrics.csv so far."""
        return self._tables["metrics.csv"].rows()

    def timings(self) -> list[dict]:
        """The rows of timings.csv so far."""
        return self._tables["timings.csv"].rows()

    def log_hparams(self, config: TrainConfig, splits: dict[str, dict]):
        """Write the settings, and the loss and accuracy of each split, for TensorBoard's tab of
        hyper-parameters."""
        from tensorboardX.summary import hparams

        figures = {f"{s}/{n}": splits[s][n] for s in splits for n in ("loss", "accuracy")}
        for name, value in figures.items():
            self._writer.add_scalar(name, value)
        settings = {name: _plain(value) for name, value in flat(config).items()}
        for summary in hparams(settings, figures):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def write_results(self, report: dict, counts: dict[str, np.ndarray], class_names):
        """Write per_class.csv, the pictures and, last, report.json.

        Args:
          counts: "confusion" `[K, K]` and "bins" `[3, metrics.BINS]` of the last split.
        """
        from flax_resnet.runs import plots  # here, because importing Matplotlib delays the start

        self.check()
        confusion = counts["confusion"]
        write_per_class(self.path / "per_class.csv", confusion, class_names)
        for name, draw, *values in (
            ("curves.png", plots.curves, self.rows(), report["best_epoch"]),
            ("confusion_matrix.png", plots.confusion_matrix, confusion, class_names),
            ("reliability.png", plots.reliability, counts["bins"]),
        ):
            draw(picture := io.BytesIO(), *values)
            tables.write(self.path / name, picture.getvalue())
        self.write_report(report)

    def write_report(self, report: dict):
        """Write report.json, which marks the run as finished."""
        content = as_json(report)
        files = {name: tables.read(self.path / name) for name in ("config.json", *RESULTS)}
        self._write_digests(files | {"report.json": content})
        tables.write(self.path / "report.json", content)

    def _write_digests(self, contents: dict[str, bytes | None]):
        """Write the digests of files in the format of `sha256sum`."""
        self.check()
        lines = [
            f"{hashlib.sha256(content).hexdigest()}  {name}\n"
            for name, content in contents.items()
            if content is not None
        ]
        tables.write(self.path / DIGESTS, "".join(lines).encode())

    def close(self):
        """Release the lock."""
        if self._writer is not None:
            self._writer.close()
        self._lock.close()


class SharedDirectory(RunDirectory):
    """The run directory of the other processes of a run, for which the first process writes."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not (self.path / LOCK).exists():
            raise InputError(f"{self.path} is not on a file system that all processes share")

    def _nothing(self, *_, **__):
        pass

    check = write_config = start_logs = marks = _nothing
    log_step = log_epoch = log_hparams = write_results = close = _nothing


def default_name(config: TrainConfig) -> str:
    """ARCH-DATASET, the name of a run's directory."""
    scheme, _, place = config.data.dataset.partition(":")
    folder = Path(os.path.realpath(os.path.expanduser(place)))
    own = {"folder": folder.name, "tfds": place, "hf": place}
    own["arrayrecord"] = (folder if folder.is_dir() else folder.parent).name
    return re.sub(r"\W+", "-", f"{config.model.arch}-{own.get(scheme, scheme)}")


def reserve(config: TrainConfig) -> Path:
    """Make a new directory runs/ARCH-DATASET, or runs/ARCH-DATASET-N if that exists."""
    name = default_name(config)
    check_place("runs")
    for number in itertools.count(1):
        path = Path("runs") / (name + (f"-{number}" if number > 1 else ""))
        path.parent.mkdir(exist_ok=True)
        try:
            path.mkdir()
            return path
        except FileExistsError:
            pass


def check_root(root: Path, what: str):
    """Raises InputError unless the directories of several runs can lie in `root`.

    Args:
      what: the runs, for the message, in the plural.
    """
    if os.path.lexists(root) and not root.is_dir():
        raise InputError(f"{root} is not a directory")
    if is_begun(root):
        raise InputError(f"{root} is a run itself: {what} need another directory")


def check_usable(run_dir: Path, *, resume: bool, overwrite: bool):
    """Raises InputError if no run may begin at `run_dir`, or go on or be replaced as asked."""
    check_place(run_dir)
    if os.path.lexists(run_dir) and not run_dir.is_dir():
        raise InputError(f"{run_dir} is not a directory")
    if not run_dir.exists() or _names(run_dir) <= {LOCK}:
        return
    _check_is_run(run_dir)
    if not (resume or overwrite):
        raise InputError(
            f"{run_dir} exists: continue it with `resume`, or replace it with `overwrite`"
        )


def _check_is_run(run_dir: Path):
    """Raises InputError unless the directory has a run's checkpoints or config, or only the files
    of a run that was killed at its start."""
    config, checkpoints, fault = run_dir / "config.json", run_dir / "checkpoints", ""
    if any((checkpoints / str(step) / "manifest.json").is_file() for step in steps_in(checkpoints)):
        return
    if os.path.lexists(config):
        try:
            config_from_file(config)
            if os.path.lexists(run_dir / LOCK):  # other programs have a config.json too
                return
        except InputError as error:
            fault = f" ({error})"
    if not _names(run_dir) <= {LOCK, DIGESTS, "SHA256SUMS.tmp", "config.tmp"}:
        raise InputError(f"{run_dir} is no run and not empty{fault}; choose another directory")


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def _summary_writer(path: Path, purge_step: int):
    """A TensorBoard writer. It hides torch from tensorboardX, which would import it for seconds."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(str(path), purge_step=purge_step)


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks


def _lock(directory: Path, say: Say):
    """Lock the directory until the process ends; InputError if another process holds the lock."""
    file = _open_lock(directory / LOCK)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read().decode(errors="replace").strip() or "unknown"
        raise InputError(f"{directory} is in use by a running process (pid {owner})") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{directory}: no lock ({error.strerror}); make sure that only one run uses it")
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    return file


def _open_lock(path: Path):
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = open(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise InputError(f"{path} is no regular file") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InputError(f"{path} is no regular file")
    return file


def _plain(value) -> bool | int | float | str:
    """A setting as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def as_json(value) -> bytes:
    """The content of a JSON file, with null for numbers that are not finite."""
    return (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode()


def write_per_class(path: Path, confusion: np.ndarray, class_names):
    """Write precision, recall, F1 and support of every class as CSV."""
    scores = metrics.per_class(confusion)
    rows = [
        {"class": name, **{key: values[i].item() for key, values in scores.items()}}
        for i, name in enumerate(class_names)
    ]
    tables.write(path, tables.as_csv(rows))
