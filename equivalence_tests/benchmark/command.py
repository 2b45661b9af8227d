"""Time a network in JAX and in PyTorch, side by side in one run.

python scripts/benchmark.py --arch resnet18 --image-size 32 --batch-size 128
python scripts/benchmark.py --arch resnet50 --batch-size 256 --dtype bfloat16 --json resnet50.json
python scripts/benchmark.py --arch resnet18 --frameworks jax --variants jit multi_step
python scripts/benchmark.py --arch resnet20 --dataset folder:DIR --modes end_to_end --epochs 3
python scripts/benchmark.py --recipe cifar10-fast --dataset folder:DIR --modes time_to_accuracy

Both frameworks use the same weights, batch, optimizer and precision. The command compares their
logits before it times anything. --json FILE also writes a chart beside the file. --keep DIR stores
measurements in DIR, so the same command, with the same code and device, continues after an
interruption.
Exit status: 0 done, 1 the two do not compute the same or nothing was measured, 2 bad input.
"""

import os
from pathlib import Path
from typing import get_args

os.environ["JAX_PLATFORMS"] = "cpu"  # this process leaves the GPU's memory to its children

import numpy as np
from rich import box
from rich.table import Table

from equivalence_tests.benchmark import agreement, charts, end_to_end, throughput
from equivalence_tests.benchmark.timing import VARIANTS, Job
from flax_resnet import list_models
from flax_resnet.commands import cli, exits, output_files
from flax_resnet.config import WITH_STEMS, Stem, check_stem
from flax_resnet.data.sources import places
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.recipes import RECIPES
from flax_resnet.runs import environment
from flax_resnet.runs.display import Display

DTYPES = ("float32", "bfloat16", "float64")
DEVICES = ("cpu", "gpu")
MODES = (*throughput.MODES, *end_to_end.MODES)
LEAST_TWIN = 0.97
"""Share of torchvision's speed below which the twin (our PyTorch network) is no fair reference."""

REPEATS = {  # a step on a CPU takes seconds
    "cpu": {"warmup": 2, "blocks": 3, "steps": 4, "steps_per_dispatch": 4},
    "gpu": {"warmup": 10, "blocks": 3, "steps": 40, "steps_per_dispatch": 20},
}


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--recipe", metavar="NAME", help="take the settings of a recipe")
    about = "name of the network (default: resnet18)"
    parser.add_argument("--arch", default="resnet18", metavar="NAME", help=about)
    stems = "|".join(get_args(Stem))
    parser.add_argument("--stem", metavar=stems, help="first layers of the network")
    about = "width and height in pixels (default: 32 with a network or stem for CIFAR, else 224)"
    parser.add_argument("--image-size", type=int, metavar="INT", help=about)
    about = "number of classes (default: 10 up to 64 pixels, else 1000)"
    parser.add_argument("--num-classes", type=int, metavar="INT", help=about)
    about = "images in a batch (default: 128)"
    parser.add_argument("--batch-size", type=int, default=128, metavar="INT", help=about)
    about = "type of the computation (default: float32)"
    parser.add_argument("--dtype", default="float32", metavar="|".join(DTYPES), help=about)
    parser.add_argument("--device", metavar="cpu|gpu", help="default: gpu if there is one")
    about = "frameworks to time (default: both)"
    parser.add_argument("--frameworks", default="jax,torch", metavar="jax,torch", help=about)
    about = "ways of running a step to time (default: all)"
    parser.add_argument("--variants", nargs="+", metavar="NAME", help=about)
    parser.add_argument(
        "--modes",
        nargs="+",
        default=throughput.MODES,
        metavar="NAME",
        help=f"what to time: any of {', '.join(MODES)} (default: the first two)",
    )
    parser.add_argument(
        "--rounds", type=int, default=2, metavar="INT", help="processes that time each variant"
    )
    for name, text in (
        ("warmup", "steps in each process before timing starts"),
        ("blocks", "timed blocks in each process"),
        ("steps", "steps in a block"),
        ("steps-per-dispatch", "steps that one call of the variant multi_step runs"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="INT", help=text)
    course = end_to_end.Course()
    section = parser.add_argument_group("trainings on real images")
    for name, kind, default, text in (
        ("dataset", str, course.dataset, "digits or folder:DIR"),
        ("epochs", int, course.epochs, "epochs per training"),
        ("target-accuracy", float, course.target, "validation accuracy to reach"),
        ("workers", int, course.workers, "worker processes of PyTorch's DataLoader"),
    ):
        metavar = {str: "NAME[:PATH]", int: "INT", float: "FLOAT"}[kind]
        section.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    about = "write the figures to FILE, and a chart beside it as .png; - is stdout, without a chart"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="store measurements in DIR; the same command continues from them",
    )
    start_from_recipe(parser)
    args = parser.parse_args()
    check(args)
    return args


def start_from_recipe(parser):
    """Make the settings of --recipe the defaults of the other flags."""
    name = parser.parse_known_args()[0].recipe
    if name is None:
        return
    cli.check_choice("--recipe", name, RECIPES)
    config = RECIPES[name].config
    names = ("arch", "stem", "dtype", "image_size", "batch_size", "epochs")
    groups = (config.model, config.data, config)
    parser.set_defaults(
        **{n: getattr(group, n) for n in names for group in groups if hasattr(group, n)}
    )


def check(args):
    cli.check_choice("--arch", args.arch, list_models())
    cli.check_choice("--dtype", args.dtype, DTYPES)
    check_stem(args.arch, args.stem)
    for flag, value, valid in (
        ("--device", args.device, DEVICES),
        *(("--frameworks", name, VARIANTS) for name in args.frameworks.split(",")),
        *(("--modes", name, MODES) for name in args.modes),
        *(("--variants", name, sum(VARIANTS.values(), ())) for name in args.variants or ()),
    ):
        if value is not None:
            cli.check_choice(flag, value, valid)
    for name in ("image_size", "num_classes", "batch_size", "rounds", "epochs", *REPEATS["cpu"]):
        cli.check_positive(f"--{name.replace('_', '-')}", getattr(args, name))
    check_files(args)
    output_files.check_folder("--keep", args.keep, own=("outcomes", "caches"))


def check_files(args):
    """Raises InputError unless the figures and their chart replace nothing but those of an earlier
    benchmark."""
    data = places(args.dataset)
    output_files.check_outputs({"--json": args.json}, data=data)
    chart = chart_beside(args.json)
    output_files.check_outputs({"--json": args.json, "the chart beside it": chart}, data=data)
    if chart and chart.exists() and not args.json.exists():
        raise InputError(f"--json: the chart {chart} exists, and no {args.json} with it; move it")


def chart_beside(path: Path | None) -> Path | None:
    """The picture that belongs to a file of figures; None for standard output."""
    return None if path is None or str(path) == "-" else path.with_suffix(".png")


def make_settings(args) -> throughput.Settings:
    device = args.device or ("gpu" if Path("/dev/nvidiactl").exists() else "cpu")
    large = args.arch in WITH_STEMS and args.stem != "cifar"
    size = args.image_size or (224 if large else 32)
    given = {name: getattr(args, name) for name in REPEATS[device]}
    repeats = REPEATS[device] | {k: v for k, v in given.items() if v is not None}
    job = Job(
        arch=args.arch,
        stem=(args.stem or "imagenet") if args.arch in WITH_STEMS else None,
        num_classes=args.num_classes or (1000 if size > 64 else 10),
        image_size=size,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=device,
        **repeats,
    )
    variants = {
        name: tuple(v for v in VARIANTS[name] if v in (args.variants or (v,)))
        for name in args.frameworks.split(",")
    }
    course = end_to_end.Course(
        dataset=args.dataset,
        epochs=args.epochs,
        target=args.target_accuracy,
        workers=args.workers,
        recipe=args.recipe,
    )
    return throughput.Settings(
        job=job,
        variants=variants,
        modes=tuple(args.modes),
        course=course,
        rounds=args.rounds,
        keep=args.keep,
    )


def empty_table(document: dict, job: Job, mode: str, *columns: str) -> Table:
    """A table without rows; its first column is aligned to the left, the others to the right."""
    title = f"{mode}: {job.arch}, {job.image_size} pixels, {job.dtype}, {job.device}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = "\n".join(notes(document, mode)), "left"
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right", no_wrap=True)
    return table


def table(document: dict, job: Job, mode: str) -> Table:
    columns = ("variant", "images/s", "iqr", "compile", "warm", "GiB", "MFU", "roof")
    table = empty_table(document, job, mode, *columns)
    for row in document["rows"]:
        if row["mode"] == mode:
            table.add_row(label(row), *cells(row))
    return table


def course_table(document: dict, job: Job, mode: str) -> Table:
    """The table of a mode that trains on real images."""
    columns = ("program", "images/s", "iqr", "first epoch", "to accuracy", "cold", "accuracy")
    table = empty_table(document, job, mode, *columns)
    for row in (row for row in document["rows"] if row["mode"] == mode):
        cold, warm = end_to_end.split_seconds(row)
        table.add_row(
            row["framework"],
            f"{row['images_per_second']:,.1f}",
            f"{row['images_per_second_iqr'] / row['images_per_second']:.0%}",
            f"{min(row['seconds_to_first_epoch']):.1f} s",
            median_seconds(warm),
            median_seconds(cold),
            f"{np.median(row['validation_accuracy']):.4f}",
        )
    return table


def median_seconds(rounds: list[float | None]) -> str:
    if None in rounds:
        return "not reached"
    return f"{np.median(rounds):.1f} s" if rounds else ""


def cells(row: dict) -> list[str]:
    warm, memory = row["compile_seconds_warm_cache"], row["peak_memory_bytes"]
    return [
        f"{row['images_per_second']:,.1f}",
        f"{row['images_per_second_iqr'] / row['images_per_second']:.0%}",
        f"{row['compile_seconds']:.1f} s",
        "" if warm is None else f"{warm:.1f} s",
        "" if memory is None else f"{memory / 2**30:.2f}",
        f"{row['model_flop_utilisation']:.0%}",
        f"{row['roofline_share']:.0%}",
    ]


def notes(document: dict, mode: str) -> list[str]:
    """Lines below the table: skipped variants with reasons, warnings, ratios."""
    lines = [
        f"{label(row)}: skipped, {row['reason']}"
        for row in document["skipped"]
        if row["mode"] == mode
    ]
    rows = [row for row in document["rows"] if row["mode"] == mode]
    lines += [
        f"{label(row)}: out of memory at batch {row['requested_batch_size']}, halved to"
        f" {row['batch_size']}"
        for row in rows
        if row["batch_size"] != row.get("requested_batch_size", row["batch_size"])
    ]
    shares = ("model_flop_utilisation", "roofline_share")
    if above := [label(row) for row in rows if max(row.get(share, 0) for share in shares) > 1]:
        reached = "the ceilings are what one product and one copy reached"
        lines.append(f"above 100%: {', '.join(above)}; {reached}")
    return lines + comparisons(document, mode)


def comparisons(document: dict, mode: str) -> list[str]:
    lines = []
    if found := document["ratios"].get(mode):
        best = f"JAX ({found['best_jax']}) is {found['best_to_best']:.2f} x PyTorch"
        lines.append(f"{best} ({found['best_torch']})")
    if ratio := document["torchvision"].get(mode, {}).get("ratio"):
        lines.append(f"our PyTorch net is {ratio:.2f} x torchvision's, both eager")
        if ratio < LEAST_TWIN:
            lines.append("warning: our PyTorch net is slow, which favours JAX in the comparison")
    if mode == "end_to_end" and (share := document["ratios"].get("real_to_synthetic")):
        lines.append(f"JAX trains on real images at {share:.2f} x its speed on synthetic ones")
    return lines


def label(row: dict) -> str:
    return f"{row['framework']} {row['variant']}"


def write(path: Path, document: dict):
    """Write the figures and, where there are any, their chart."""
    output_files.write_json(path, document)
    chart = chart_beside(path)
    if chart and document["rows"]:
        with replacing(chart) as place:
            charts.speeds(place, document["rows"])


def main():
    args = parse()
    settings, display = make_settings(args), Display(stderr=str(args.json) == "-")
    about = {"command": exits.command_line(), "environment": environment.describe(1)}
    try:
        document = throughput.measure(settings, display.say)
    except agreement.Disagreement as error:
        raise exits.CheckFailed(str(error)) from None
    except end_to_end.Failed as error:
        raise InputError(str(error)) from None
    document |= about
    for mode in settings.modes:
        show = course_table if mode in end_to_end.MODES else table
        display.show(show(document, settings.job, mode))
    if args.json:
        write(args.json, document)
    if not document["rows"]:
        raise exits.CheckFailed("nothing was measured; the reasons are above")
