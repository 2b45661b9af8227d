"""Runs everything that needs a GPU in stages, each with its own log.

    python -m equivalence_tests.benchmark.gpu --list
    python -m equivalence_tests.benchmark.gpu --cifar10 folder:DIR  # all stages, into runs/gpu
    python -m equivalence_tests.benchmark.gpu parity resnet50  # these stages
    python -m equivalence_tests.benchmark.gpu --minutes 9  # stops after 9 minutes

Finished stages are skipped and interrupted ones continue where they can. So on a machine that is
available for minutes at a time, repeating the command completes all stages. Exit status: 0 all
stages passed, 1 a stage failed or is not done, 2 there is no GPU.
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from flax_resnet.recipes import CIFAR10, RECIPES

ROOT = Path(__file__).parents[2]
NUMERICS = "equivalence_tests/numerics"
LIMIT_SECONDS = 3600
"""Time limit of a stage, so that one that hangs does not block the others."""

GRACE_SECONDS = 20
"""Time for a training to save its work after SIGTERM."""

PARITY = {
    # Products in full float32, because the tests detect TF32 as a difference.
    "parity": f"-m pytest {NUMERICS}/test_float32.py {NUMERICS}/test_layers.py -n 0",
    "parity-float64": f"-m pytest {NUMERICS}/test_float64.py -m quick -n 0",
}
BFLOAT16 = "scripts/benchmark.py --device gpu --dtype bfloat16"
SMALL = f"{BFLOAT16} --arch resnet18 --stem cifar --image-size 32"
FAST = "scripts/benchmark.py --device gpu --recipe cifar10-fast --dataset {cifar10}"
BENCHMARKS = {
    "resnet50": f"{BFLOAT16} --arch resnet50 --batch-size 256",
    "resnet50-large": f"{BFLOAT16} --arch resnet50 --batch-size 512",
    "resnet18": f"{SMALL} --batch-size 512",
    "resnet18-large": f"{SMALL} --batch-size 1024",
    "end-to-end": f"{FAST} --modes train end_to_end --variants jit multi_step eager compile",
    # Round 1 has an empty compilation cache and is reported separately.
    "to-94": f"{FAST} --modes time_to_accuracy --target-accuracy 0.94 --rounds 4",
    "to-96": f"{FAST} --modes time_to_accuracy --target-accuracy 0.96 --epochs 60",
}
FIRST = {f"{name}-first": name for name in ("resnet50", "resnet18")}
"""The most important comparisons first; the full benchmarks reuse their outcomes."""

XLA_FLAGS = {
    "without-graphs": "--xla_gpu_enable_command_buffer=",
    "without-autotuning": "--xla_gpu_autotune_level=0",
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "graphs-with-convolutions": "--xla_gpu_enable_command_buffer=+CONVOLUTION",
    "fused-convolutions": "--xla_gpu_experimental_enable_conv_fusion=true",
    "without-triton": "--xla_gpu_enable_triton_gemm=false",
}
"""XLA flags with which JAX's training steps are timed, besides the defaults."""

FLAGGED = {
    f"{name}-{word}": (name, word) for word in XLA_FLAGS for name in ("resnet50", "resnet18")
}
REMEDIES = {
    "remedies-resnet50": "--arch resnet50 --image-size 224 --batch-size 256",
    "remedies-resnet18": "--arch resnet18 --stem cifar --image-size 32 --batch-size 512",
}
WAYS = "relu-keeps-input two-pass one-pass shifted running library-max-pool differentiated library"
STARTUP = "-m equivalence_tests.benchmark.startup --arch resnet18"
CIFAR10_RECIPES = [
    name
    for name, recipe in RECIPES.items()
    if recipe.config.data.dataset == CIFAR10 and not recipe.starts_from
]


def stages(cifar10: str, out: Path) -> dict[str, list[str]]:
    """{name of a stage: arguments of python}."""
    step = "--modes train --frameworks jax --variants jit"
    first = "--modes train --variants jit multi_step eager compile compile-max-autotune --rounds 1"
    jobs = {name: f"{BENCHMARKS[base]} {first}" for name, base in FIRST.items()} | BENCHMARKS
    jobs |= {name: f"{BENCHMARKS[base]} {step}" for name, (base, _) in FLAGGED.items()}
    benchmarks = {
        name: f"{flags} --json {out}/benchmark-gpu-{name}.json --keep {out}/{FIRST.get(name, name)}"
        for name, flags in jobs.items()
    }
    startup = {"startup": f"{STARTUP} --json {out}/startup-gpu.json"}
    # These two write into results/.
    startup |= {"bounds": "-m equivalence_tests.benchmark.measured"}
    startup |= {"precision": "-m equivalence_tests.studies.card_precision"}
    remedies = {
        name: f"-m equivalence_tests.benchmark.lowerings {WAYS} {flags} --dtype bfloat16 --steps 20"
        f" --json {out}/{name}.json"
        for name, flags in REMEDIES.items()
    }
    recipes = {
        name: f"scripts/reproduce.py {name} --cifar10 {{cifar10}} --runs {out}/runs --results {out}"
        for name in CIFAR10_RECIPES
    }
    every = benchmarks | startup | PARITY | remedies | recipes
    return {name: flags.format(cifar10=cifar10).split() for name, flags in every.items()}


def run(name: str, arguments: list[str], out: Path, seconds: float) -> bool:
    """Run a stage unless it has passed before; returns whether it passed within `seconds`."""
    done = out / f"{name}.done"
    if done.exists():
        return True
    started = time.perf_counter()
    with open(out / f"{name}.log", "a") as log:
        command, variables = [sys.executable, *arguments], os.environ | settings(name)
        status = call(command, variables, log, seconds)
    print(f"{name}: status {status}, {time.perf_counter() - started:.0f} s", flush=True)
    if status == 0:
        done.touch()
    return status == 0


def settings(name: str) -> dict[str, str]:
    """Environment variables of a stage."""
    if name in PARITY:
        return {"JAX_PLATFORMS": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return {"XLA_FLAGS": XLA_FLAGS[FLAGGED[name][1]]} if name in FLAGGED else {}


def call(command: list[str], environment: dict, log, seconds: float) -> int | str:
    """Run a command and end all its processes; its exit status, or "cut off" after `seconds`."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "cut off"
    finally:
        end(process)


def end(process: subprocess.Popen):
    """End all processes of a stage; left alone they would hold GPU memory and disturb the next."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)  # raises if no process is left
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def in_turn(names: list[str], out: Path) -> list[str]:
    """Stages that never ran first, then the longest waiting, so none blocks the others."""
    logs = {name: out / f"{name}.log" for name in names}
    return sorted(names, key=lambda n: logs[n].stat().st_mtime if logs[n].exists() else 0)


def run_all(names: list[str], every: dict, out: Path, minutes: float) -> bool:
    """Run stages for at most `minutes`; returns whether all passed."""
    deadline = time.monotonic() + 60 * minutes - GRACE_SECONDS
    passed = []
    for name in in_turn(names, out):
        left = deadline - time.monotonic()
        if left > 0:
            passed.append(run(name, every[name], out, min(left, LIMIT_SECONDS)))
    return passed == [True] * len(names)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="STAGE", help="default: all")
    parser.add_argument("--cifar10", default=CIFAR10, metavar="DATASET")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="time limit of all stages"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the commands without running them"
    )
    args = parser.parse_args()
    every = stages(args.cifar10, args.out.absolute())
    if unknown := set(args.names) - set(every):
        parser.error(f"unknown {', '.join(sorted(unknown))}; --list names them all")
    return args, every


def main() -> int:
    args, every = parse()
    chosen = args.names or list(every)
    if args.list:
        for name in chosen:
            variables = [f"{key}={value}" for key, value in settings(name).items()]
            print(f"{name}: {' '.join([*variables, 'python', *every[name]])}")
        return 0
    if not Path("/dev/nvidiactl").exists():
        print("there is no NVIDIA GPU here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage too
    return int(not run_all(chosen, every, args.out, args.minutes))


if __name__ == "__main__":
    sys.exit(main())
