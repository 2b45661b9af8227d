"""Flips one bit in any file of a run directory; it must be harmless, or the file must be named.

    python -m equivalence_tests.studies.flips --flips 5000     # ten minutes

Trains a small network twice: to its end, and to the middle. For each flip, one bit of one file is
changed, the run is read as --resume, evaluate, predict, convert and compare read it, and the bit is
restored. Writes results/flips.json; exit status 1 after a traceback or a silent change.
"""

import argparse
import collections
import contextlib
import hashlib
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from equivalence_tests import results
from equivalence_tests.studies import faults
from flax_resnet.config import to_dict
from flax_resnet.errors import InputError
from flax_resnet.runs import views
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.directory import TABLES
from flax_resnet.runs.owned import RESULTS
from flax_resnet.runs.tables import Table

FLAGS = "--arch resnet20 --train-images 64 --epochs 3 --batch-size 16 --devices 1".split()
KINDS = ("harmless", "named", "silent", "traceback")


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """Within this context one bit of the file is flipped."""
    original = path.read_bytes()
    content = bytearray(original)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


def reading(run_dir: Path) -> tuple[dict, list[str]]:
    """The data that the commands read from a run, and their messages about its files."""
    taken, said = {"refused": False}, []
    try:
        taken["config"] = to_dict(views.read_config(run_dir, said.append))
        said += views.faults(run_dir)
        taken |= {"rows": views.rows(run_dir), "report": views.report(run_dir)}
        taken |= _from_checkpoints(run_dir, said)
    except InputError as error:
        return {"refused": True}, [str(error)]
    if (run_dir / "report.json").exists():  # an unfinished run writes these files again
        said += views.damaged_steps(run_dir)
        shown = [path for kind in ("json", "csv", "png") for path in run_dir.glob(f"*.{kind}")]
        taken["shown"] = {path.name: _digest(path) for path in shown}
    return taken, said


def _from_checkpoints(run_dir: Path, said: list[str]) -> dict:
    """Latest and best step with their content, and the tables that a resumed run continues."""
    checkpoints = Checkpoints(run_dir / "checkpoints", say=said.append)
    try:
        latest, best = checkpoints.latest(), checkpoints.best()
        if latest is None:
            return {"latest": None}
        marks = checkpoints.document(latest)["tables"]
    finally:
        checkpoints.close()
    copies = {name: (run_dir / name, run_dir / "checkpoints" / name) for name in TABLES}
    return {
        "latest": (latest, _content(run_dir / "checkpoints" / str(latest))),
        "best": (best, _content(run_dir / "checkpoints" / str(best))),
        "tables": {name: Table(*copies[name]).recover(marks[name]) for name in TABLES},
    }


def _content(step: Path) -> dict:
    files = [path for path in step.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(step)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verdict(run_dir: Path, whole: dict) -> str:
    """One of KINDS.

    Data that a message names may be missing or come from an older checkpoint. A changed config or
    row is a silent change, even with a message.
    """
    try:
        taken, said = reading(run_dir)
    except Exception:
        traceback.print_exc()
        return "traceback"
    if taken == whole:
        return "named" if said else "harmless"
    if not said or (not taken["refused"] and not _is_of(taken, whole)):
        return "silent"
    return "named"


def _is_of(taken: dict, whole: dict) -> bool:
    rows = {name: content or b"" for name, content in taken.get("tables", {}).items()}
    compared = taken["report"] in ({}, whole["report"])
    compared &= taken["rows"] == whole["rows"][: len(taken["rows"])]
    return (
        compared
        and taken["config"] == whole["config"]
        and all(whole["tables"][name].startswith(content) for name, content in rows.items())
    )


def study(run_dir: Path, flips: int, seed: int) -> tuple[dict, list[str]]:
    """Counts of KINDS, and the files of all flips that were not named.

    Every file is equally likely, whatever its size.
    """
    draw, (whole, said) = random.Random(seed), reading(run_dir)
    if said:
        raise RuntimeError(f"the run is not sound: {said}")
    files = sorted(p for p in run_dir.rglob("*") if p.is_file() and p.stat().st_size)
    counts, rows = collections.Counter(dict.fromkeys(KINDS, 0)), []
    for _ in range(flips):
        path = draw.choice(files)
        with flipped(path, draw.randrange(8 * path.stat().st_size)):
            kind = verdict(run_dir, whole)
        counts[kind] += 1
        if kind != "named":
            rows.append(f"{kind}: {path.relative_to(run_dir)}")
    return dict(counts), rows


def unfinished(run_dir: Path):
    """Turn a finished run into one that was cut off after its second checkpoint."""
    newest = steps_in(run_dir / "checkpoints")[-1]
    shutil.rmtree(run_dir / "checkpoints" / str(newest))
    for name in ("report.json", *RESULTS):
        (run_dir / name).unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=5000, metavar="N")
    args = parser.parse_args()
    total, rows = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed, cut in enumerate((False, True)):
            run_dir = Path(folder) / f"run{seed}"
            faults.finish(run_dir, *FLAGS)
            if cut:
                unfinished(run_dir)
            counts, found = study(run_dir, args.flips // 2, seed)
            total.update(counts)
            rows.update(found)
    results.write("flips", {"flips": sum(total.values()), **total, "not_named": dict(rows)})
    print(dict(total), dict(rows))
    return int(bool(total["silent"] + total["traceback"]))


if __name__ == "__main__":
    sys.exit(main())
