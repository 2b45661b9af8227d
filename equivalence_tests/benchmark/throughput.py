"""Times JAX and PyTorch with the same network, weights, batch, optimizer and precision.

    measure(settings) -> {"rows", "skipped", "ratios", "torchvision", "ceilings", ...}

Every variant runs in its own process, one at a time, in rounds: A B C, A B C. So variants do not
share memory or threads, see the same machine load, and compile twice: with an empty cache and with
a full one. Nothing is timed until the logits of both sides agree. The "twin" is `torch_ref`'s net.
"""

import contextlib
import dataclasses
import itertools
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from equivalence_tests.benchmark import agreement, end_to_end, fresh_process, roofline
from equivalence_tests.benchmark.timing import PLAIN, VARIANTS, Job, Kept
from equivalence_tests.parity import inputs
from flax_resnet.weights.convert import Architecture

MODES = ("train", "inference")

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float64": 8}

GPU_STATE = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison."""

    job: Job
    """The common settings of all jobs; framework, variant and mode are ignored."""

    variants: dict[str, tuple[str, ...]]
    """{framework: names of its variants}."""

    modes: tuple[str, ...] = MODES
    """Names from MODES and `end_to_end.MODES`."""

    course: end_to_end.Course = end_to_end.Course()
    """Settings of the trainings in the modes of `end_to_end`."""

    rounds: int = 2

    keep: Path | None = None
    """Folder of outcomes, from which an interrupted call continues. None: a temporary folder."""


def measure(settings: Settings, say=print) -> dict:
    """Runs the whole comparison.

    Raises:
      Disagreement: logits or first losses differ by more than rounding.
    """
    load = os.getloadavg()
    keep = contextlib.nullcontext(settings.keep) if settings.keep else TemporaryDirectory()
    with keep as folder:
        kept = Kept(Path(folder).absolute(), fresh_process.origin(settings.job))
        files = weight_files(settings.job, kept.folder)
        missing = {f: why for f in settings.variants if (why := fresh_process.absence(f))}
        agreed = agreement.compare_logits(settings, files, missing, kept, say)
        if agreed and "train" in settings.modes:
            agreed |= agreement.compare_losses(settings, files, kept, say)
        plan = make_plan(settings, files, missing)
        outcomes = run_rounds(plan, settings.rounds, kept, say)
        ceilings = measure_ceilings(settings, missing, kept) if plan else {}
        real = run_real(settings, missing, kept, say)
    outcomes = agreement.check_losses(outcomes)
    network = roofline.layers(
        settings.job.arch,
        stem=settings.job.stem,
        num_classes=settings.job.num_classes,
        image_size=settings.job.image_size,
    )
    rows = [summarize(runs, ceilings, network) for runs in outcomes if timed(runs)]
    own = [row for row in rows if row["variant"] != "torchvision"] + real
    return {
        "rows": own,
        "skipped": [*absent(settings, missing), *filter(None, map(reason, outcomes))],
        "ratios": ratios(own),
        "torchvision": against_torchvision(rows),
        "agreement": agreed,
        "ceilings": ceilings,
        "network": describe_network(network),
        "method": describe_method(settings, load),
    }


def weight_files(job: Job, folder: Path) -> dict[str, Path]:
    """Files of equal random weights; each framework reads its own file."""
    shapes = Architecture(job.arch, job.num_classes, 3, job.stem).shapes()
    arrays = inputs.random_state(shapes, np.random.default_rng(0))
    folder.mkdir(parents=True, exist_ok=True)
    files = {framework: folder / f"{framework}.npz" for framework in VARIANTS}
    for path in files.values():
        np.savez(path, **arrays)
    return files


def absent(settings, missing: dict) -> list[dict]:
    return [
        {"framework": framework, "variant": variant, "mode": mode, "reason": missing[framework]}
        for framework in missing
        for mode, variant in itertools.product(settings.modes, settings.variants[framework])
    ]


def make_plan(settings: Settings, files, missing) -> list[Job]:
    """The jobs of one round; the frameworks take turns."""
    variants = {f: v for f, v in settings.variants.items() if f not in missing}
    if "torch" in variants:
        variants["torch"] = (*variants["torch"], "torchvision")
    turns = itertools.zip_longest(*([(f, v) for v in names] for f, names in variants.items()))
    turns = [turn for group in turns for turn in group if turn]
    return [
        replace(
            settings.job,
            framework=framework,
            variant=variant,
            mode=mode,
            weights=str(files[framework]),
        )
        for mode in settings.modes
        if mode in MODES
        for framework, variant in turns
    ]


def run_real(settings: Settings, missing, kept: Kept, say) -> list[dict]:
    """Rows of the modes that train on real images."""
    jobs = [
        replace(settings.job, framework=framework, mode=mode)
        for mode in settings.modes
        if mode in end_to_end.MODES
        for framework in settings.variants
        if framework not in missing
    ]
    if not jobs:
        return []
    variables = fresh_process.environment
    return end_to_end.measure(jobs, settings.course, settings.rounds, variables, kept, say)


def run_rounds(plan: list[Job], rounds: int, kept: Kept, say) -> list[list[tuple[Job, dict]]]:
    """[job][round] -> (job as it ran, outcome); skipped jobs are not run in later rounds."""
    outcomes = [[] for _ in plan]
    for number in range(1, rounds + 1):
        for runs, job in zip(outcomes, plan, strict=True):
            if runs and "skipped" in runs[-1][1]:
                continue
            say(f"round {number} of {rounds}: {job.mode} {job.framework} {job.variant}")
            runs.append(run_where_it_fits(runs[-1][0] if runs else job, kept, number))
    return outcomes


def run_where_it_fits(job: Job, kept: Kept, number: int) -> tuple[Job, dict]:
    """Run a job, halving the batch until it fits in memory."""
    outcome = fresh_process.launch(job, kept, number)
    while "out_of_memory" in outcome and job.batch_size > 1:
        job = replace(job, batch_size=job.batch_size // 2)
        outcome = fresh_process.launch(job, kept, number)
    return job, {"skipped": "out of memory"} if "out_of_memory" in outcome else outcome


def timed(runs) -> bool:
    return "seconds_per_step" in runs[-1][1]


def reason(runs) -> dict | None:
    """The entry of a skipped program with its reason; None if it was timed."""
    job, outcome = runs[-1]
    if timed(runs):
        return None
    names = {name: getattr(job, name) for name in ("framework", "variant", "mode")}
    return names | {"reason": outcome["skipped"]}


def measure_ceilings(settings, missing, kept: Kept) -> dict:
    """The highest FLOP/s and bytes/s of either framework, and those of each framework."""
    found = {}
    for framework in settings.variants.keys() - missing.keys():
        job = replace(settings.job, framework=framework, variant=PLAIN[framework], mode="ceilings")
        outcome = fresh_process.launch(job, kept)
        if "flops" in outcome:
            found[framework] = outcome
    best = {key: max((o[key] for o in found.values()), default=None) for key in ("flops", "bytes")}
    return best | {"dtype": settings.job.dtype, "by": found}


def summarize(runs, ceilings: dict, network) -> dict:
    """The row of one timed program."""
    job = runs[-1][0]
    outcomes = [outcome for ran, outcome in runs if ran == job and "seconds_per_step" in outcome]
    seconds = np.array([s for outcome in outcomes for s in outcome["seconds_per_step"]])
    rates = job.batch_size / seconds
    low, median, high = np.percentile(rates, (25, 50, 75))
    step = float(np.median(seconds))
    flops = roofline.step_flops(network, job.mode, job.batch_size)
    floor = roofline.floor_seconds(network, job.mode, job.batch_size, ITEMSIZE[job.dtype], ceilings)
    names = ("framework", "variant", "mode", "arch", "stem", "image_size", "dtype", "device")
    cold, warm = compile_seconds(outcomes)
    return {name: getattr(job, name) for name in names} | {
        "batch_size": job.batch_size,
        "requested_batch_size": runs[0][0].batch_size,
        "images_per_second": float(median),
        "images_per_second_iqr": float(high - low),
        "ms_per_step": 1000 * step,
        "compile_seconds": cold,
        "compile_seconds_warm_cache": warm,
        "peak_memory_bytes": max(outcome["peak_memory_bytes"] or 0 for outcome in outcomes) or None,
        "model_flop_utilisation": flops / step / ceilings["flops"],
        "roofline_share": floor / step,
        "roofline_images_per_second": job.batch_size / floor,
        "images_per_second_blocks": rates.tolist(),
        "hardware": outcomes[0]["device"],
    }


def compile_seconds(outcomes) -> list[float | None]:
    """Seconds of the first compilation with an empty cache, and of the first with a full one."""
    return [
        next((o["compile_seconds"] for o in outcomes if o["empty_cache"] == empty), None)
        for empty in (True, False)
    ]


def ratios(rows: list[dict]) -> dict:
    """{mode: ratio of the best speeds of JAX and PyTorch, and of the best JAX to eager PyTorch}.

    "real_to_synthetic" is the best speed of JAX on real images over that on synthetic images.
    """
    found = real_to_synthetic(rows)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        speeds = {
            (row["framework"], row["variant"]): speed
            for row in rows
            if row["mode"] == mode and (speed := end_to_end.speed(row))
        }
        best = {
            f: max((k for k in speeds if k[0] == f), key=speeds.get, default=None) for f in VARIANTS
        }
        if None in best.values():
            continue
        found[mode] = {
            "best_jax": best["jax"][1],
            "best_torch": best["torch"][1],
            "best_to_best": speeds[best["jax"]] / speeds[best["torch"]],
        }
        if ("torch", "eager") in speeds:
            found[mode]["best_to_eager"] = speeds[best["jax"]] / speeds["torch", "eager"]
    return found


def real_to_synthetic(rows: list[dict]) -> dict:
    speeds = {
        mode: [
            row["images_per_second"]
            for row in rows
            if (row["framework"], row["mode"]) == ("jax", mode)
        ]
        for mode in ("end_to_end", "train")
    }
    if not all(speeds.values()):
        return {}
    real, synthetic = map(max, speeds.values())
    return {"real_to_synthetic": real / synthetic}


def against_torchvision(rows: list[dict]) -> dict:
    """{mode: images/s of torchvision's network, and the twin's ratio to it}; both eager."""
    found = {}
    for row in rows:
        if row["variant"] != "torchvision":
            continue
        twin = [r for r in rows if (r["mode"], r["variant"]) == (row["mode"], "eager")]
        ratio = twin[0]["images_per_second"] / row["images_per_second"] if twin else None
        found[row["mode"]] = {"images_per_second": row["images_per_second"], "ratio": ratio}
    return found


def describe_network(network) -> dict:
    return {
        "forward_flops_per_image": roofline.step_flops(network, "inference", 1),
        "parameters_of_convolutions_and_linear_layers": sum(x.weights for x in network),
        "convolution_outputs_per_image": sum(x.outputs for x in network),
    }


def describe_method(settings: Settings, load) -> dict:
    job = settings.job
    return {
        "rounds": settings.rounds,
        "blocks_per_round": job.blocks,
        "steps_per_block": job.steps,
        "warmup_steps_per_round": job.warmup,
        "steps_per_dispatch_of_multi_step": job.steps_per_dispatch,
        "spread": "interquartile range over all blocks of all rounds",
        "compile_seconds": "first call with its step: trace, compile, run; in an empty cache",
        "seconds_to_accuracy": "of each round, whose number is the seed; compared by the median of"
        " the rounds after the first, which alone starts with an empty compilation cache",
        "peak_memory_bytes": "of the allocator on the device"
        if job.device == "gpu"
        else "resident set of the process",
        "load_average_before": load[0],
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "gpu": fresh_process.query_gpu(GPU_STATE) if job.device == "gpu" else None,
    }
