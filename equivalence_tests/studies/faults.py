"""Kills and stops real runs, resumes them and compares each with an uninterrupted run, bit for bit.

    python -m equivalence_tests.studies.faults --dataset folder:CIFAR10     # a quarter of an hour

25 runs get SIGKILL, at least 7 of them during a save, and 10 get SIGTERM, at random moments of the
whole run; each is resumed. Runs with worker processes get SIGKILL too, and what is left of them
10 s later is counted. With --dataset, the cost of one checkpoint per epoch is measured for a
ResNet-18 on that data set. Writes results/faults.json; exit status 1 if a resumed run differs or
something is left.
"""

import argparse
import contextlib
import hashlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from equivalence_tests import results
from equivalence_tests.studies import growth
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.tables import read_rows
from flax_resnet.training import restore

ROOT = Path(__file__).parents[2]

EPOCHS = 8
FLAGS = (
    f"--arch basic_cnn --train-images 640 --epochs {EPOCHS} --batch-size 16 --devices 1"
    " --dropout 0.3 --rotation 10 --brightness 0.2 --mixup 0.2 --optimizer adam --lr 0.003"
    " --accumulate-steps 2 --ema-decay 0.9 --clip-norm 1 --schedule plateau --plateau-patience 0"
    " --patience 3"
).split()
"""Uses all random and stateful parts of a training; early stopping may end the run."""

KILLS, KILLS_IN_A_SAVE, TERMS, ORPHANED = 18, 7, 10, 5

Moment = Callable[[Path], bool]
"""Run directory -> whether the moment has come."""


def start(run_dir: Path, *flags: str, group=False) -> subprocess.Popen:
    """`python scripts/train.py` as a process of its own, on one CPU device.

    Args:
      group: the process leads a process group, of which its workers are members.
    """
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--run-dir", str(run_dir)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*command, *(flags or FLAGS)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=group,
    )


def finish(run_dir: Path, *flags: str) -> str:
    """Runs a training to its end; returns its output."""
    process = start(run_dir, *flags)
    out, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"{run_dir.name} ended with status {process.returncode}: {out[-2000:]}")
    return out


def fingerprint(run_dir: Path) -> dict:
    """State that a resumed run has to reproduce.

    SHA-256 of model, optimizer, BatchNorm statistics and averages, of metrics.csv and
    per_class.csv; the epochs at which the run was best and stopped.
    """
    document, _, _, state = restore.restore(run_dir, Checkpoints.latest)
    sha = hashlib.sha256()
    for path, leaf in jax.tree.flatten_with_path(state)[0]:
        sha.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    files = ("metrics.csv", "per_class.csv")
    digests = {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in files}
    return {"state": sha.hexdigest(), **digests, "progress": document["progress"]}


def after(epochs: int, seconds: float) -> Moment:
    """The moment `seconds` after the end of an epoch; 0 epochs: after config.json exists."""
    reached = None

    def now(run_dir):
        nonlocal reached
        if reached is None and (run_dir / "config.json").exists():
            if len(read_rows(run_dir / "metrics.csv")) >= epochs:
                reached = time.monotonic()
        return reached is not None and time.monotonic() - reached >= seconds

    return now


def in_save(number: int) -> Moment:
    """The moment when the files of the save with this number appear."""
    seen = set()

    def now(run_dir):
        seen.update(_unfinished(run_dir))
        return len(seen) >= number

    return now


def strike(run_dir: Path, moment: Moment, signum: int) -> dict:
    """Start a run and send it a signal at a moment.

    Returns:
      {"step", "phase", "status", "said"}: newest complete checkpoint and phase of the run at that
      moment, exit status and output. "phase" is "finished" if the run ended before the moment.
    """
    process = start(run_dir)
    while process.poll() is None and not moment(run_dir):
        time.sleep(0.002)
    process.send_signal(signum)
    seen = {"step": _newest(run_dir), "phase": _phase(run_dir)} if signum != signal.SIGKILL else {}
    out, _ = process.communicate(timeout=120)
    # After SIGKILL, the directory is still as it was at that moment.
    seen = seen or {"step": _newest(run_dir), "phase": _phase(run_dir)}
    return {**seen, "status": process.returncode, "said": out}


def _unfinished(run_dir: Path) -> set[str]:
    """Steps whose files are being written."""
    return {
        re.split(r"\D", entry.name)[0]
        for entry in _entries(run_dir)
        if "tmp" in entry.name or not (entry / "manifest.json").exists()
    }


def _entries(run_dir):
    folder = run_dir / "checkpoints"
    return [p for p in folder.iterdir() if p.name[0].isdigit()] if folder.exists() else []


def _newest(run_dir) -> int:
    whole = [p for p in _entries(run_dir) if p.name.isdigit() and (p / "manifest.json").exists()]
    return max((int(p.name) for p in whole), default=0)


def _phase(run_dir) -> str:
    if (run_dir / "report.json").exists():
        return "finished"
    if _unfinished(run_dir):
        return "save"
    if not _entries(run_dir):
        return "before the first checkpoint"
    return "report" if (run_dir / "per_class.csv").exists() else "training"


def survive(run_dir: Path, moment: Moment, signum: int, expected: dict) -> dict:
    """Strikes a run, resumes it and compares it; returns its row."""
    row = strike(run_dir, moment, signum)
    row.pop("said")
    said = finish(run_dir, "--resume")
    resumed = re.search(r"resumed at step (\d+)", said)
    got = fingerprint(run_dir)
    different = [name for name, value in expected.items() if got[name] != value]
    return row | {
        "signal": signal.Signals(signum).name,
        "resumed_from": int(resumed[1]) if resumed else 0,
        "different": different,
    }


def straight(run_dir: Path) -> tuple[dict, float]:
    """An uninterrupted run: its fingerprint, and seconds of an epoch."""
    finish(run_dir)
    timings = read_rows(run_dir / "timings.csv")
    return fingerprint(run_dir), statistics.median(row["seconds"] for row in timings)


def moments(seconds: float) -> list[tuple[Moment, int]]:
    """(moment, signal) of every run: within any epoch but the last, or at the start of a save.

    The moments are drawn with a fixed seed; `seconds` is the length of an epoch.
    """
    draw = random.Random(0)

    def in_an_epoch():
        return after(draw.randrange(EPOCHS - 1), draw.uniform(0, seconds))

    rows = [(in_an_epoch(), signal.SIGKILL) for _ in range(KILLS)]
    rows += [(in_save(draw.randint(1, EPOCHS)), signal.SIGKILL) for _ in range(KILLS_IN_A_SAVE)]
    return rows + [(in_an_epoch(), signal.SIGTERM) for _ in range(TERMS)]


def orphans(folder: Path) -> dict:
    """Kill runs that decode images in two worker processes.

    Returns:
      {"killed", "workers", "processes_left", "segments_left"}: numbers of runs, of their workers at
      that moment, and of processes and segments of shared memory that are there 10 s later.
    """
    (folder / "images").mkdir()
    growth.write_folder(folder / "images", 2000)
    flags = f"--arch basic_cnn --dataset folder:{folder / 'images'} --num-workers 2 --cache none"
    draw, counts = random.Random(0), Counter(killed=ORPHANED)
    for number in range(ORPHANED):
        run_dir, shared = folder / f"orphaned{number}", set(os.listdir("/dev/shm"))
        process, moment = start(run_dir, *flags.split(), group=True), after(1, draw.uniform(0, 2))
        while process.poll() is None and not moment(run_dir):
            time.sleep(0.01)
        if process.poll() is not None:
            raise RuntimeError(f"it ended by itself: {process.communicate()[0][-2000:]}")
        counts["workers"] += len(group_of(process.pid)) - 1
        process.kill()
        process.wait()
        time.sleep(10)
        counts["processes_left"] += len(group_of(process.pid))
        counts["segments_left"] += len(set(os.listdir("/dev/shm")) - shared)
    return dict(counts)


def group_of(leader: int) -> list[int]:
    """Numbers of the living processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(entry.parent.name))
    return found


def checkpoint_cost(folder: Path, dataset: str) -> dict:
    """Cost of one checkpoint per epoch for ResNet-18.

    Measures seconds of an epoch, of its wait for the checkpoint, and of writing a checkpoint
    alone; the last is the cost without background writing. The large stem has the shortest epochs,
    so the largest shares.
    """
    flags = ["--arch", "resnet18", "--stem", "imagenet", "--dataset", dataset, "--epochs", "2"]
    finish(folder / "cost", *flags)
    timing = read_rows(folder / "cost" / "timings.csv")[1]
    *_, state = restore.restore(folder / "cost", Checkpoints.latest)
    checkpoints, before = Checkpoints(folder / "alone"), time.monotonic()
    checkpoints.save(1, state, {}, improvement=False)
    checkpoints.wait()
    writing = time.monotonic() - before
    checkpoints.close()
    return {
        "dataset": dataset.partition(":")[0],
        "epoch_seconds": timing["seconds"],
        "waited_seconds": timing["checkpoint_seconds"],
        "writing_seconds": writing,
        "waited_share": timing["checkpoint_seconds"] / timing["seconds"],
        "writing_share": writing / timing["seconds"],
    }


def summary(rows: list[dict]) -> dict:
    """Counts by signal: runs struck, resumed to the same bits, and struck during a save."""
    counts = {}
    for name in ("SIGKILL", "SIGTERM"):
        of_it = [row for row in rows if row["signal"] == name]
        counts[name] = {
            "struck": len(of_it),
            "same_bits_after_resume": sum(not row["different"] for row in of_it),
            "in_a_save": sum(row["phase"] == "save" for row in of_it),
        }
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    parser.add_argument("--dataset", help="also measure the cost of checkpoints on this data set")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        expected, seconds = straight(Path(folder) / "straight")
        tasks = [
            pool.submit(survive, Path(folder) / str(number), moment, signum, expected)
            for number, (moment, signum) in enumerate(moments(seconds))
        ]
        rows = []
        for task in tasks:
            rows.append(task.result())
            print(rows[-1], flush=True)
        left = orphans(Path(folder))
        cost = checkpoint_cost(Path(folder), args.dataset) if args.dataset else "not run"
    measured = {"flags": " ".join(FLAGS), **summary(rows), "workers": left}
    results.write("faults", measured | {"checkpoint_cost": cost, "rows": rows})
    print(summary(rows), left, cost)
    bad = any(row["different"] for row in rows)
    return int(bad or left["processes_left"] > 0 or left["segments_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
