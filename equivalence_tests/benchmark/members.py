"""Times a training of several members beside as many single trainings, as whole processes.

    python -m equivalence_tests.benchmark.members         # 20 minutes; results/members.json
    python -m equivalence_tests.benchmark.members --step  # 2 minutes; results/members-step.json

Both are `scripts/train.py` with the same flags, one with `--members N`, the other N times with the
seeds of the members. They take turns, and the machine must be idle. The images/s of the steps are
those of timings.csv without the first epoch, which compiles; "wall" is the whole process. With
`--step`, a step of all members is timed alone: one member after the other, and all at once by
`vmap`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from equivalence_tests import results
from equivalence_tests.parity import inputs
from flax_resnet.config import AugmentConfig, ModelConfig, ParallelConfig, TrainConfig
from flax_resnet.devices.parallel import Engine
from flax_resnet.models import create_from_config
from flax_resnet.runs.tables import read_rows
from flax_resnet.training import steps
from flax_resnet.training.network import Network

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


def step_seconds(members: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds of a step of all members on random images, computed in both ways in turn."""
    config = TrainConfig(
        batch_size=BATCH,
        model=ModelConfig(arch=ARCH, num_classes=10),
        augment=AugmentConfig(random_crop=0),
        parallel=ParallelConfig(devices=1),
    )
    network = Network(create_from_config(config.model, in_channels=3))
    step = steps.make_train_step(
        network, config, inputs.AsGiven(), num_classes=10, steps_per_epoch=1
    )
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, SIZE, SIZE, 3), np.float32)
    batch = {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 10}
    batches = (batch | {"index": np.arange(BATCH, dtype=np.int32)},) * members
    programs, states, found = {}, {}, {"in_turn": [], "at_once": []}
    for way in found:
        engine = Engine(config.parallel)
        engine.members_in_turn = way == "in_turn"
        programs[way] = engine.compile_members(step, 1)
        state = steps.make_state(network.initial, config)
        states[way] = tuple(jax.tree.map(jnp.copy, state) for _ in range(members))
    for _ in range(1 + rounds):
        for way, program in programs.items():
            started = time.monotonic()
            outcome = program(states[way], {}, batches, np.arange(members, dtype=np.int32))
            states[way] = jax.block_until_ready(outcome)[0]
            found[way].append(time.monotonic() - started)
    return {way: statistics.median(each[1:]) for way, each in found.items()}  # the first compiles


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
    parser.add_argument("--step", action="store_true", help="time a step of the members alone")
    args = parser.parse_args()
    if args.step:
        facts = {"arch": ARCH, "image_size": SIZE, "batch_size": BATCH, "members": args.members}
        results.write("members-step", facts | {"seconds": step_seconds(args.members)})
        return
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
