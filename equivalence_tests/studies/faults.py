"""What a run survives: real processes killed, stopped and taken up again, each held to the bits of
a run that nobody touched.

    python -m equivalence_tests.studies.faults --dataset folder:CIFAR10     # a quarter of an hour

25 runs die by SIGKILL, 7 of them or more inside a save, and 10 get SIGTERM, at moments drawn from
the whole life of a run; each is resumed. With --dataset it measures what a checkpoint an epoch
costs a ResNet-18 there. Writes results/faults.json; exit status 1 if a run came back otherwise.
"""

import argparse
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from equivalence_tests import results
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
"""All that is random or remembers is in flight; early stopping may end the run."""

KILLS, KILLS_IN_A_SAVE, TERMS = 18, 7, 10

Moment = Callable[[Path], bool]
"""Run directory -> whether it is time."""


def start(run_dir: Path, *flags: str) -> subprocess.Popen:
    """`python scripts/train.py` as a process of its own, on one CPU device."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--run-dir", str(run_dir)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*command, *(flags or FLAGS)],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run_dir: Path, *flags: str) -> str:
    """A run to its end; what it printed."""
    process = start(run_dir, *flags)
    out, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise RuntimeError(f"{run_dir.name} ended with status {process.returncode}: {out[-2000:]}")
    return out


def fingerprint(run_dir: Path) -> dict:
    """What has to come back: SHA-256 of model, optimizer, BatchNorm and averages, of metrics.csv
    and per_class.csv, and the epochs at which it was best and stopped."""
    document, _, _, state = restore.restore(run_dir, Checkpoints.latest)
    sha = hashlib.sha256()
    for path, leaf in jax.tree.flatten_with_path(state)[0]:
        sha.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    files = ("metrics.csv", "per_class.csv")
    digests = {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in files}
    return {"state": sha.hexdigest(), **digests, "progress": document["progress"]}


def after(epochs: int, seconds: float) -> Moment:
    """So long after the end of an epoch; after 0 epochs, the run's config.json is there."""
    reached = None

    def now(run_dir):
        nonlocal reached
        if reached is None and (run_dir / "config.json").exists():
            if len(read_rows(run_dir / "metrics.csv")) >= epochs:
                reached = time.monotonic()
        return reached is not None and time.monotonic() - reached >= seconds

    return now


def in_save(number: int) -> Moment:
    """As soon as the files of its n-th save appear."""
    seen = set()

    def now(run_dir):
        seen.update(_unfinished(run_dir))
        return len(seen) >= number

    return now


def strike(run_dir: Path, moment: Moment, signum: int) -> dict:
    """Begin a run and send it a signal at a moment.

    Returns:
      {"step", "phase", "status"}: the newest whole checkpoint and what was going on at that
      moment, and how it ended. "phase" is "finished" if the run was faster.
    """
    process = start(run_dir)
    while process.poll() is None and not moment(run_dir):
        time.sleep(0.002)
    process.send_signal(signum)
    seen = {"step": _newest(run_dir), "phase": _phase(run_dir)} if signum != signal.SIGKILL else {}
    out, _ = process.communicate(timeout=120)
    # A killed process leaves things as they were at that moment.
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
    """Strike, resume, compare; the row for the table."""
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
    """The run that nobody touches: its fingerprint, and seconds of an epoch."""
    finish(run_dir)
    timings = read_rows(run_dir / "timings.csv")
    return fingerprint(run_dir), statistics.median(row["seconds"] for row in timings)


def moments(seconds: float) -> list[tuple[Moment, int]]:
    """When to do what: in any of the epochs but the last, `seconds` long each, or as a save begins.

    The draws are the same in every run of this program.
    """
    draw = random.Random(0)

    def in_an_epoch():
        return after(draw.randrange(EPOCHS - 1), draw.uniform(0, seconds))

    rows = [(in_an_epoch(), signal.SIGKILL) for _ in range(KILLS)]
    rows += [(in_save(draw.randint(1, EPOCHS)), signal.SIGKILL) for _ in range(KILLS_IN_A_SAVE)]
    return rows + [(in_an_epoch(), signal.SIGTERM) for _ in range(TERMS)]


def checkpoint_cost(folder: Path, dataset: str) -> dict:
    """Seconds of an epoch of ResNet-18, of what it waited for its checkpoint, and of the whole
    writing by itself: the share that would be lost if nothing of it went on in the background.

    The large stem makes the shortest epochs, so the largest shares.
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
    """Counts of the rows by signal: how many, how many came back to the same bits."""
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
    parser.add_argument("--dataset", help="measure the cost of checkpoints on this one too")
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
        cost = checkpoint_cost(Path(folder), args.dataset) if args.dataset else "not run"
    measured = {"flags": " ".join(FLAGS), **summary(rows), "checkpoint_cost": cost, "rows": rows}
    results.write("faults", measured)
    print(summary(rows), cost)
    return int(any(row["different"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
