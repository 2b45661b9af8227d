"""Runs a job of the benchmark in its own process, with its own compilation caches."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

from equivalence_tests.benchmark.timing import Job, Kept
from flax_resnet.runs.environment import describe

ROOT = Path(__file__).parents[2]

KEPT_MEMORY = ":".join(
    f"glibc.malloc.{option}"
    for option in ("arena_max=1", "mmap_max=0", f"trim_threshold={2**31 - 1}")
)
"""Allocator settings with which `scripts/train.py` runs on a CPU (`commands/memory.py`)."""


_TIMED = (
    "flax_resnet/**/*.py", "torch_ref/*.py", "equivalence_tests/parity/inputs.py",
    *(f"equivalence_tests/benchmark/{name}.py" for name in (
        "timing", "timed_*", "fresh_process", "end_to_end"
    )),
)  # fmt: skip
"""Files whose code an outcome depends on."""

_COMPUTING = ("jax", "flax", "optax", "grain", "torch", "triton", "nvidia", "numpy", "pillow")
"""Prefixes of the packages that an outcome depends on."""


def launch(job: Job, kept: Kept, number: int = 0) -> dict:
    """The outcome of a job in a new process, or the stored outcome of an earlier call.

    A program that fails has an outcome too: {"skipped": why}, or {"out_of_memory": True}.

    Args:
      number: number of the round; round 1 starts with empty compilation caches. 0: a job before
        the rounds, which need it, so its failure is not stored.
    """

    def run():
        outcome = kept.with_cache(job, number, partial(execute, job))
        return outcome | ({"passing": True} if number == 0 and "skipped" in outcome else {})

    key = {"job": dataclasses.asdict(replace(job, weights="")), "round": number}
    return kept.outcome(key, run)


def execute(job: Job, cache: Path) -> dict:
    """The outcome that the process of a job prints; "passing" (not stored) if it was killed."""
    command = [sys.executable, "-m", f"{__package__}.timed_{job.framework}"]
    done = subprocess.run(
        command,
        input=json.dumps(dataclasses.asdict(job), allow_nan=False),
        capture_output=True,
        text=True,
        env=environment(job, cache),
        cwd=ROOT,
    )
    if done.returncode == -9:  # SIGKILL, by which the kernel ends a process for lack of memory
        return {"out_of_memory": True, "passing": True}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        passing = {"passing": True} if done.returncode < 0 else {}
        return {"skipped": f"failed: {lines[-1][:200]}"} | passing
    return json.loads(done.stdout.splitlines()[-1])


def environment(job: Job, cache: Path) -> dict[str, str]:
    """Environment variables of a job: caches, device, a single CPU device."""
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for unusual in ("JAX_PLATFORMS", "PYTHONDONTWRITEBYTECODE"):
        variables.pop(unusual, None)
    if job.device == "cpu":
        variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        kept = job.variant.endswith("-kept-memory") or job.mode == "ceilings"
        if job.framework == "jax" or kept:
            variables["GLIBC_TUNABLES"] = KEPT_MEMORY
    return variables


def absence(framework: str) -> str | None:
    """Reason why a framework cannot run; None if it can."""
    found = importlib.util.find_spec(framework) is not None
    return None if found else f"{framework} is not installed (--extra torch)"


def origin(job: Job) -> dict:
    """Code, packages and device of this call; only outcomes with the same origin are reused."""
    sources = sorted(path for pattern in _TIMED for path in ROOT.glob(pattern))
    return {
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "packages": sorted(
            f"{found.name} {found.version}"
            for found in metadata.distributions()
            if found.name.lower().startswith(_COMPUTING)
        ),
        "device": query_gpu("name,driver_version")
        if job.device == "gpu"
        else describe(1)["device"],
    }


def query_gpu(query: str) -> str | None:
    """Output of nvidia-smi for a query; None if it cannot be run."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
