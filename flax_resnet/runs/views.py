"""Reads a run and checks its files.

The newest sound checkpoint decides what a run is. The files beside the checkpoints are views of it:
they are compared with it here, and never override it.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unicodedata import normalize

from flax_resnet.config import TrainConfig, config_from_file, differences, from_dict
from flax_resnet.errors import InputError
from flax_resnet.runs import tables
from flax_resnet.runs.checkpoint import damage, newest_document, steps_in
from flax_resnet.runs.owned import DIGESTS, RESULTS
from flax_resnet.text import listed, say

Say = Callable[[str], None]


@functools.cache
def warn(line: str):
    """Print a line on stderr, apart from the results; the same line only once."""
    say(line, file=sys.stderr)


def is_begun(run_dir: Path) -> bool:
    """True if there is a run to resume."""
    return (run_dir / "config.json").exists() or bool(steps_in(run_dir / "checkpoints"))


def document_of(run_dir: Path) -> dict:
    """The document of a run's newest sound checkpoint, {} without one; damage is not reported."""
    return newest_document(run_dir / "checkpoints", lambda line: None) or {}


def read_config(run_dir: Path | str, say: Say = warn) -> TrainConfig:
    """The complete config of a run, from its newest sound checkpoint, else from config.json.

    Args:
      say: takes messages about damaged checkpoints and differences between config.json and the
        checkpoint.

    Raises:
      InputError: there is no run, or its config is unreadable or was changed.
    """
    run_dir = Path(run_dir)
    document = newest_document(run_dir / "checkpoints", say)
    if document is None:
        return _config_without_checkpoint(run_dir)
    for fault in config_faults(run_dir, document):
        say(fault)
    return from_dict(document["config"])


def class_names(run_dir: Path | str) -> tuple[str, ...]:
    """The names of a run's classes in the order of its logits; () if there is no checkpoint."""
    document = document_of(Path(run_dir))
    return tuple(normalize("NFC", name) for name in document.get("class_names", ()))


def _config_without_checkpoint(run_dir: Path) -> TrainConfig:
    path, config = run_dir / "config.json", written_config(run_dir)
    if "config.json" in _changed(run_dir):
        raise InputError(
            f"{path} is not as the run wrote it, and there is no checkpoint to resume from: begin"
            " again with `overwrite`"
        )
    return config


def written_config(run_dir: Path) -> TrainConfig:
    """The config in config.json; InputError if it is unreadable or this is no run directory."""
    path = run_dir / "config.json"
    if not path.exists() and run_dir.exists():
        what = "without config.json" if run_dir.is_dir() else "a file"
        raise InputError(f"{run_dir} is no run directory ({what})")
    return config_from_file(path)


_DIVIDING = ("dataset", "test_fraction", "validation_fraction", "split_seed", "folds", "fold")


def divided(document: dict) -> dict:
    """Fields of `DataConfig` that name and divide the data on which the weights of a checkpoint's
    document were trained, perhaps before a conversion; {} for weights that came from a file."""
    if "divided" in document:
        return document["divided"]
    data = document["config"]["data"] if document.get("progress") else {}
    return {name: data[name] for name in _DIVIDING if name in data}


def is_trained(run_dir: Path) -> bool:
    """True if the training of a run is complete; False for a run of converted weights."""
    document = document_of(run_dir)
    progress = document.get("progress", {})
    return bool(progress) and (
        progress["epoch"] == document["config"]["epochs"] or progress.get("stopped_early", False)
    )


def config_faults(run_dir: Path, document: dict) -> list[str]:
    """At most one line: how config.json differs from the config in a checkpoint's document."""
    path, own = run_dir / "config.json", from_dict(document["config"])
    try:
        found = config_from_file(path)
    except InputError as error:
        return [f"{error}; the checkpoint's config counts"]
    if different := differences(found, own):
        return [f"{path} says {listed(different.values())}: the run's own config counts"]
    return []


def faults(run_dir: Path | str) -> list[str]:
    """A line for each file beside the checkpoints that differs from the newest sound checkpoint or
    from what the run wrote. Nothing is written.

    Raises:
      InputError: the run is finished and has no sound checkpoint.
    """
    run_dir, damaged = Path(run_dir), []
    document = newest_document(run_dir / "checkpoints", damaged.append)
    finished = (run_dir / "report.json").exists()
    if document is None and finished:
        why = listed(damaged) or f"{run_dir / 'checkpoints'} has none"
        raise InputError(
            f"{run_dir} is finished and has no sound checkpoint: {why}; remove it, or"
            " begin again with `overwrite`"
        )
    if document is None:
        return []
    whole = finished and not damaged_steps(run_dir)
    found = config_faults(run_dir, document)
    changed = _changed(run_dir) if finished else _changed(run_dir) & {"config.json"}
    if finished and _lacks_digests(run_dir, document):
        found.append(f"{run_dir / DIGESTS} is missing")
    changed -= {"config.json"} if found else set()
    for name, mark in document.get("tables", {}).items():
        copies = (run_dir / name, run_dir / "checkpoints" / name)
        found += [fault for copy in copies for fault in _table_faults(copy, mark, whole=whole)]
    return found + [f"{run_dir / name} is not as the run wrote it" for name in sorted(changed)]


def rows(run_dir: Path) -> list[dict]:
    """The rows of metrics.csv up to the newest sound checkpoint, from the first copy that is
    undamaged; [] where there is none."""
    document = document_of(run_dir)
    if not document:
        return []
    if "tables" not in document:
        return rows_of_an_earlier_version(run_dir / "metrics.csv", document, warn)
    copies = (run_dir / "metrics.csv", run_dir / "checkpoints" / "metrics.csv")
    content = tables.Table(*copies).recover(document["tables"]["metrics.csv"])
    return tables.parse(content, copies[0]) if content else []


def rows_of_an_earlier_version(path: Path, document: dict, say: Say) -> list[dict]:
    """The rows up to the checkpoint's epoch, for checkpoints of earlier versions without marks."""
    try:
        found = tables.read_rows(path)
        return [row for row in found if row["epoch"] <= document["progress"]["epoch"]]
    except (InputError, KeyError, OSError) as error:
        say(f"{path}: its rows so far are lost: {error}")
        return []


def report(run_dir: Path) -> dict:
    """The content of report.json; {} if the run is not finished, or if the report is not as the run
    wrote it, which `faults` names.

    Raises:
      InputError: as `read_report`, for a run of an earlier version, which has no digests.
    """
    document = document_of(run_dir)
    if "report.json" in _changed(run_dir) or _lacks_digests(run_dir, document):
        return {}
    path = run_dir / "report.json"
    return read_report(path) if path.exists() else {}


def read_report(path: Path) -> dict:
    """The content of a report.json; InputError unless it has numbers for each of its splits."""
    try:
        found = json.loads(tables.read(path) or b"")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from None
    splits = found.get("splits") if isinstance(found, dict) else None
    if not isinstance(splits, dict) or not all(map(_are_numbers, splits.values())):
        raise InputError(f"{path} is no report of a run: it has no figures of splits")
    return found


def _are_numbers(scores) -> bool:
    kinds = int | float | None  # null is what a run writes for NaN
    return isinstance(scores, dict) and all(isinstance(x, kinds) for x in scores.values())


def _lacks_digests(run_dir: Path, document: dict) -> bool:
    """True if the digests are gone that every run of this version has."""
    return "tables" in document and tables.read(run_dir / DIGESTS) is None


def damaged_steps(run_dir: Path) -> list[str]:
    """A line for each damaged checkpoint of a run."""
    checkpoints = run_dir / "checkpoints"
    found = {step: damage(checkpoints / str(step)) for step in steps_in(checkpoints)}
    return [f"checkpoint of step {step}: {fault}" for step, fault in found.items() if fault]


def _table_faults(path: Path, mark: dict, *, whole: bool) -> list[str]:
    """A line if a copy of a table is damaged or missing. Only the table of a run that is not
    finished may be longer than the checkpoint's mark."""
    content = tables.read(path) or b""
    if tables.at(path, mark) is None or (whole and len(content) > mark["bytes"]):
        return [f"{path} is {'not as the run wrote it' if path.exists() else 'missing'}"]
    return []


def _changed(run_dir: Path) -> set[str]:
    """The files that differ from SHA256SUMS, which runs of earlier versions do not have."""
    sums = tables.read(run_dir / DIGESTS)
    if sums is None:
        return set()
    written = {name: digest for digest, _, name in (x.partition(b"  ") for x in sums.split(b"\n"))}
    names = ("config.json", *RESULTS, "report.json")
    return {name for name in names if written.get(name.encode()) != _digest(run_dir / name)}


def _digest(path: Path) -> bytes | None:
    content = tables.read(path)
    return None if content is None else hashlib.sha256(content).hexdigest().encode()
