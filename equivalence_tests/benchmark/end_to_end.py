"""Times whole trainings from real images: scripts/train.py and python -m torch_ref.train.

Both are called as a user would, in a fresh process, with the same flags; the twin uses the usual
DataLoader and its workers. Each program writes a row of metrics.csv when an epoch and its
validation are done, and the clock is read then. So the time includes start, compilation, input,
training, validation and checkpoints.
"""

import csv
import dataclasses
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from equivalence_tests.benchmark import timing
from equivalence_tests.benchmark.timing import Job, Kept
from flax_resnet.config import TrainConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.recipes import RECIPES

MODES = ("end_to_end", "time_to_accuracy")
PROGRAMS = {"jax": ["scripts/train.py"], "torch": ["-m", "torch_ref.train"]}
VARIANTS = {"jax": "jit", "torch": "eager"}
ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.02


class Failed(Exception):
    """Raised when a training did not end well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """The data and the length of a training."""

    dataset: str = "digits"
    """The data set: digits or folder:DIR."""

    epochs: int = 3

    target: float = 0.9
    """The validation accuracy at which time_to_accuracy stops."""

    workers: int = timing.num_cores()
    """The number of worker processes of PyTorch's DataLoader."""

    recipe: str | None = None
    """The recipe of the settings that neither the course nor the job gives; None: the defaults."""

    @property
    def config(self) -> TrainConfig:
        return RECIPES[self.recipe].config if self.recipe else TrainConfig()


def measure(
    jobs: list[Job],
    course: Course,
    rounds: int,
    environment: Callable[[Job, Path], dict],
    kept: Kept,
    say,
) -> list[dict]:
    """Measures the jobs; one row for each, which is a framework in one of MODES.

    Args:
      environment: gives the variables of a process for its job and its compilation caches.
    """
    epoch_images = images_an_epoch(jobs[0], course)
    outcomes = [[] for _ in jobs]
    for number, (runs, job) in itertools.product(
        range(1, rounds + 1), zip(outcomes, jobs, strict=True)
    ):
        say(f"round {number} of {rounds}: {job.mode} {job.framework}")
        runs.append(train_once(job, course, number, environment, kept))
    return [
        summarize(job, runs, epoch_images, course) for job, runs in zip(jobs, outcomes, strict=True)
    ]


def train_once(job: Job, course: Course, number: int, environment, kept: Kept) -> dict:
    """The training of a round, which this call or an earlier one measured.

    Args:
      number: number of the round, also the seed; round 1 starts with empty compilation caches.
    """

    def run(cache):
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(job, course, Path(folder, "run"), number, environment(job, cache))
        return outcome | {"seed": number}

    key = {"job": dataclasses.asdict(job), "course": dataclasses.asdict(course), "round": number}
    return kept.outcome(key, lambda: kept.with_cache(job, number, run))


def images_an_epoch(job: Job, course: Course) -> int:
    """The number of images in an epoch, which drops the remainder of a batch."""
    data = dataclasses.replace(course.config.data, dataset=course.dataset)
    total = len(open_dataset(data).train)
    return total // job.batch_size * job.batch_size


def command(job: Job, course: Course, run_dir: Path, seed: int) -> list[str]:
    options = {
        "seed": seed,
        "arch": job.arch,
        "dataset": course.dataset,
        "image-size": job.image_size,
        "batch-size": job.batch_size,
        "epochs": course.epochs,
        "dtype": job.dtype,
        "run-dir": run_dir,
    }
    options |= {"stem": job.stem} if job.stem else {}
    if job.framework == "torch":
        options["num-workers"] = course.workers
        options["device"] = "cuda" if job.device == "gpu" else "cpu"
    else:
        options["devices"] = 1
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    settings = ["--recipe", course.recipe] if course.recipe else []
    return [sys.executable, *PROGRAMS[job.framework], *settings, *flags]


def train(job: Job, course: Course, run_dir: Path, seed: int, environment: dict) -> dict:
    """Runs one training: seconds from its start to the end of each epoch, and accuracies.

    Raises:
      Failed: the training failed; the message is its last line.
    """
    target = course.target if job.mode == "time_to_accuracy" else np.inf
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command(job, course, run_dir, seed),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )
        seconds, accuracies, status = watch(process, run_dir / "metrics.csv", started, target)
        if status not in (0, None):
            output.seek(0)
            raise Failed(f"{job.framework}: {output.read().strip().splitlines()[-1]}")
    return {"seconds": seconds, "accuracies": accuracies}


def watch(process, metrics: Path, started: float, target: float):
    """Follows metrics.csv until the process ends, or ends the process at the target.

    Returns:
      Seconds and validation accuracies, one an epoch, and the exit status, None at the target.
    """
    seconds, accuracies, status = [], [], None
    while status is None:
        status = process.poll()
        for row in read_rows(metrics)[len(seconds) :]:
            seconds.append(time.perf_counter() - started)
            accuracies.append(float(row["validation_accuracy"]))
        if accuracies and accuracies[-1] >= target:
            process.kill()
            process.wait()
            return seconds, accuracies, None
        time.sleep(POLL_SECONDS)
    return seconds, accuracies, status


def read_rows(path: Path) -> list[dict]:
    """The complete lines of a file that is being written."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def summarize(job: Job, runs: list[dict], epoch_images: int, course: Course) -> dict:
    """The row of one program; its speed is that of the epochs after the first."""
    epochs = np.concatenate([np.diff(run["seconds"]) for run in runs])
    starts = [run["seconds"][0] for run in runs]
    rates = epoch_images / epochs if len(epochs) else epoch_images / np.array(starts)
    low, median, high = np.percentile(rates, (25, 50, 75))
    names = ("framework", "mode", "arch", "stem", "image_size", "dtype", "device", "batch_size")
    return {name: getattr(job, name) for name in names} | {
        "variant": VARIANTS[job.framework],
        "images_per_second": float(median),
        "images_per_second_iqr": float(high - low),
        "ms_per_step": 1000 * job.batch_size / float(median),
        "seconds_to_first_epoch": starts,
        "seconds_to_accuracy": [seconds_to(run, course.target) for run in runs],
        "validation_accuracy": [run["accuracies"][-1] for run in runs],
        "epochs": [len(run["seconds"]) for run in runs],
        "seeds": [run["seed"] for run in runs],
        "empty_cache": [run["empty_cache"] for run in runs],
    }


def seconds_to(run: dict, target: float) -> float | None:
    reached = (s for s, a in zip(run["seconds"], run["accuracies"], strict=True) if a >= target)
    return next(reached, None)


def split_seconds(row: dict) -> tuple[list[float | None], list[float | None]]:
    """Splits the seconds to the accuracy by rounds with empty and with full compilation caches."""
    rounds = list(zip(row["seconds_to_accuracy"], row["empty_cache"], strict=True))
    return [s for s, empty in rounds if empty], [s for s, empty in rounds if not empty]


def speed(row: dict) -> float | None:
    """The speed of a row: images a second, or accuracies reached a second.

    The second kind counts the rounds with full compilation caches if there are any; it is None if
    a round did not reach the accuracy.
    """
    if row["mode"] != "time_to_accuracy":
        return row["images_per_second"]
    cold, warm = split_seconds(row)
    seconds = warm or cold
    return None if None in seconds else 1 / float(np.median(seconds))
