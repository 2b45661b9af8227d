"""Measures the time from the command of a training to its first step.

python -m equivalence_tests.benchmark.startup --arch resnet18 --json results/startup-cpu.json

The first of three starts has an empty compilation cache; the others use the cache it left.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
CLOCK = "STARTED_AT"  # variable: start of the timed process, in seconds since the epoch
STARTS = ("cold", "second", "third")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args, flags = parser.parse_known_args()
    if CLOCK in os.environ:
        return first_step(flags)
    seconds = measure(flags)
    print(", ".join(f"{name} start: first step after {s:.1f} s" for name, s in seconds.items()))
    if args.json:
        args.json.write_text(json.dumps(document(seconds), indent=1, allow_nan=False) + "\n")


def measure(flags: list[str]) -> dict[str, float]:
    """{name of a start: seconds from the start of its process to the metrics of its first step}."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: start(flags, Path(folder), name) for name in STARTS}


def start(flags, folder: Path, name: str) -> float:
    command = [sys.executable, "-m", "equivalence_tests.benchmark.startup", *flags]
    command += ["--log-steps", "1", "--run-dir", str(folder / name)]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder), CLOCK: str(time.time())}
    for unusual in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):  # users have neither
        environment.pop(unusual, None)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return float(done.stdout.splitlines()[-1])


def first_step(flags: list[str]):
    """Run scripts/train.py up to the metrics of its first step."""
    from flax_resnet.commands import main
    from flax_resnet.devices.parallel import Engine

    original = Engine.fetch_metrics

    def fetch(engine, metrics):
        original(engine, metrics)
        print(f"\n{time.time() - float(os.environ[CLOCK])}", flush=True)
        os._exit(0)

    sys.argv = ["scripts/train.py", *flags]
    with mock.patch.object(Engine, "fetch_metrics", fetch):
        main.run("train")


def document(seconds: dict[str, float]) -> dict:
    from flax_resnet.commands import exits
    from flax_resnet.runs import environment

    return {
        "seconds_to_first_step": seconds,
        "load_average_after": os.getloadavg()[0],
        "command": exits.command_line(),
        "environment": environment.describe(1),
    }


if __name__ == "__main__":
    main()
