"""Times a training of several members beside as many single trainings, as whole processes.

    python -m equivalence_tests.benchmark.members         # 20 minutes; results/members.json

Both are `scripts/train.py` with the same flags, one with `--members N`, the other N times with the
seeds of the members. They take turns, and the machine must be idle. The images/s of the steps are
those of timings.csv without the first epoch, which compiles; "wall" is the whole process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from equivalence_tests import results
from flax_resnet.runs.tables import read_rows

ROOT = Path(__file__).parents[2]
ARCH, SIZE, BATCH, EPOCHS = "resnet20", 32, 64, 4


def flags(dataset: str) -> list[str]:
    """The flags that both ways share."""
    words = f"--arch {ARCH} --image-size {SIZE} --batch-size {BATCH} --epochs {EPOCHS} --devices 1"
    return [*words.split(), "--dataset", dataset, "--schedule", "constant"]


def run(run_dir: Path, *arguments: str) -> dict:
    """Seconds of a process of train.py, the seconds and images of its steps, its peak memory."""
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--run-dir", str(run_dir)]
    started = time.monotonic()
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"train.py ended with status {os.waitstatus_to_exitcode(status)}")
    return {"wall": time.monotonic() - started, "peak_mib": usage.ru_maxrss / 1024}


def speed(run_dirs: list[Path], *, together: bool) -> float:
    """Images a second of the steps after the first epoch, of all members.

    Args:
      together: the runs share their seconds; otherwise they took them one after the other.
    """
    epochs = [read_rows(run_dir / "timings.csv")[1:] for run_dir in run_dirs]
    rates = [statistics.median(row["images_per_second"] for row in rows) for rows in epochs]
    return sum(rates) if together else statistics.harmonic_mean(rates)


def measure_together(members: int, shared: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "members"
        found = run(root, "--members", str(members), *shared)
        return found | {"images_per_second": speed(sorted(root.iterdir()), together=True)}


def measure_alone(members: int, shared: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(seed) for seed in range(members)]
        each = [run(p, "--seed", str(seed), *shared) for seed, p in enumerate(places)]
        return {
            "wall": sum(one["wall"] for one in each),
            "peak_mib": max(one["peak_mib"] for one in each),
            "images_per_second": speed(places, together=False),
        }


def summary(rounds: list[dict]) -> dict:
    """Medians, and the medians of the ratios of each round; above 1 the members are faster."""

    def ratio(name, turn):
        one, other = turn["members"][name], turn["alone"][name]
        return one / other if name == "images_per_second" else other / one

    names = ("images_per_second", "wall")
    return {f"{name}_ratio": statistics.median(ratio(name, t) for t in rounds) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=8, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--dataset", default="digits")
    args = parser.parse_args()
    shared, rounds = flags(args.dataset), []
    ways = {"members": measure_together, "alone": measure_alone}
    for number in range(args.rounds):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        rounds.append({name: ways[name](args.members, shared) for name in order})
        print(rounds[-1], flush=True)
        document = {"members": args.members, "flags": " ".join(shared)}
        results.write("members", document | summary(rounds) | {"rounds": rounds})


if __name__ == "__main__":
    sys.exit(main())
