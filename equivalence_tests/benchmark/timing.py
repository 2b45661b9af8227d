"""The process of one timed program; `timed_jax` and `timed_torch` supply the program.

The process reads a `Job` as JSON from standard input and prints its outcome as one line of JSON.
Neither framework is imported here.
"""

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

VARIANTS = {
    "jax": ("jit", "multi_step", "mesh", "deterministic", "pmap", "folded"),
    "torch": (
        "eager",
        "eager-kept-memory",
        "compile",
        "compile-kept-memory",
        "compile-reduce-overhead",
        "compile-max-autotune",
        "folded",
    ),
}

PLAIN = {framework: names[0] for framework, names in VARIANTS.items()}
"""The plain variants, which must agree; any other variant that disagrees is skipped."""

CHECKED_STEPS = 3
"""Number of training steps whose loss is reported; it depends on optimizer and BatchNorm too."""

CHECKED_IMAGES = 4
"""Number of images of a batch whose logits are reported."""


class Skipped(Exception):
    """The job cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A program to time, and its numbers of steps."""

    arch: str
    stem: str | None
    num_classes: int
    image_size: int
    batch_size: int

    dtype: str
    """float32, bfloat16 (computation only; parameters are float32) or float64."""

    device: str
    """cpu or gpu."""

    framework: str = ""
    variant: str = ""

    mode: str = "train"
    """train, inference, logits (of one batch, without timing) or ceilings (of the device)."""

    weights: str = ""
    """.npz under torch's names and in its layouts."""

    warmup: int = 10
    blocks: int = 3
    """Number of timed blocks of `steps` steps; each block waits for the device once, at its end."""

    steps: int = 40

    steps_per_dispatch: int = 20
    """Steps per dispatch of the variant multi_step."""


class Kept(NamedTuple):
    """A folder of outcomes and compilation caches; jobs with a stored outcome are not run again."""

    folder: Path

    origin: dict
    """Code, packages and device; outcomes with another origin are not used."""

    def outcome(self, key: dict, run: Callable[[], dict]) -> dict:
        """The stored outcome of a key, else that of `run`, stored unless marked "passing"."""
        key = key | {"origin": self.origin}
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        name = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / "outcomes" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())["outcome"]
        outcome = run()
        if "passing" not in outcome:
            _write_whole(path, json.dumps({"key": key, "outcome": outcome}, allow_nan=False))
        return outcome

    def with_cache(self, job: Job, number: int, run: Callable[[Path], dict]) -> dict:
        """The outcome of `run` with a folder of compilation caches, and whether it was empty.

        Each program and mode has its own folder, so programs do not share compiled code.

        Args:
          number: number of the round; in round 1 the folder is empty.
        """
        folder = self.folder / "caches" / f"{job.framework}-{job.variant}-{job.mode}"
        if number == 1:
            shutil.rmtree(folder, ignore_errors=True)
        empty = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder) | {"empty_cache": empty}


def _write_whole(path: Path, text: str):
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


RULE = dict(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
LABEL_SMOOTHING = 0.1


class Program(NamedTuple):
    """A compiled step with everything that it works on."""

    step: Callable[[], None]
    """Starts one dispatch."""

    finish: Callable[[], None]
    """Waits for the device."""

    values: Callable[[], list[float]]
    """Returns the logits or losses of the last dispatch."""

    steps_per_dispatch: int = 1


class Side(NamedTuple):
    """The functions that a framework supplies."""

    build: Callable[[Job], Program]

    measure_ceilings: Callable[[Job], dict]
    """{"flops": per second, in the job's dtype, "bytes": per second}."""

    describe: Callable[[Job], dict]
    """Name of the device and versions."""

    peak_memory: Callable[[Job], int | None]
    """Peak bytes on the device; None if the framework does not count them."""


def synthetic_batch(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images float32 [B, H, W, 3] and labels [B], the same in every process."""
    rng = np.random.default_rng(0)
    shape = (job.batch_size, job.image_size, job.image_size, 3)
    return rng.standard_normal(shape, np.float32), rng.integers(0, job.num_classes, shape[0])


def main(side: Side):
    """Run the job of this process."""
    job = Job(**json.load(sys.stdin))
    try:
        outcome = side.measure_ceilings(job) if job.mode == "ceilings" else run(side, job)
        outcome["device"] = side.describe(job)
    except Skipped as reason:  # the reason may be gone at the next call
        outcome = {"skipped": str(reason), "passing": True}
    except Exception as error:
        if not out_of_memory(error):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        outcome = {"out_of_memory": True}
    print(json.dumps(outcome, allow_nan=False))


def run(side: Side, job: Job) -> dict:
    program = side.build(job)
    started = time.perf_counter()
    program.step()
    program.finish()
    outcome = {"compile_seconds": time.perf_counter() - started, "values": program.values()}
    if job.mode == "logits":
        return outcome
    if job.mode == "train":
        while len(outcome["values"]) < CHECKED_STEPS:
            program.step()
            outcome["values"] += program.values()
        outcome["values"] = outcome["values"][:CHECKED_STEPS]
    repeat(program, job.warmup)
    outcome["seconds_per_step"] = [repeat(program, job.steps) for _ in range(job.blocks)]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcome["peak_memory_bytes"] = side.peak_memory(job) if job.device == "gpu" else resident
    return outcome


def repeat(program: Program, steps: int) -> float:
    """Seconds per step of a block that waits for the device once, at its end."""
    dispatches = -(-steps // program.steps_per_dispatch)
    started = time.perf_counter()
    for _ in range(dispatches):
        program.step()
    program.finish()
    return (time.perf_counter() - started) / (dispatches * program.steps_per_dispatch)


def best_seconds(call: Callable[[], None], finish: Callable[[], None]) -> float:
    """Seconds of one call: the minimum of 20.

    Operands have to be random: a GPU multiplies zeros and ones with less power, thus faster.
    """
    call()
    finish()
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        call()
        finish()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def ceiling_sizes(job: Job) -> tuple[int, int]:
    """Side of the square matrices to multiply, and number of values to copy."""
    return (8192, 1 << 29) if job.device == "gpu" else (2048, 1 << 26)


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory"))
