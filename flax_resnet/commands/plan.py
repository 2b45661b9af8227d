"""Compile a training step for GPUs and TPUs that are not here, and say what it needs there.

python scripts/plan.py --arch resnet50 --target h100 --dtype bfloat16 --batch-size 256
python scripts/plan.py --arch resnet50 --target h100:8 v5e:2x4 --batch-size 512 --json plan.json
python scripts/plan.py --arch resnet18 --dataset folder:DIR --target a100 --evaluation

Nothing runs on a device. The bound is a speed that the program cannot exceed, computed from the
data sheet of the card. Exit status: 0 done, 1 a program does not fit, 2 bad input.
"""

import argparse
import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# JAX's default, 1, shows XLA's warnings about memory, which a plan tells more plainly.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax.numpy as jnp
from flax import nnx
from rich.table import Table

from flax_resnet import recipes
from flax_resnet.commands import cli, exits, output_files
from flax_resnet.config import WITH_SHORTCUTS, TrainConfig, resolve, to_dict
from flax_resnet.data.prepare import suggested_size, that_fit
from flax_resnet.data.sources import open_dataset, places
from flax_resnet.devices import program, targets
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.models import create_from_config, floor
from flax_resnet.runs import environment, plots
from flax_resnet.runs.display import Display
from flax_resnet.training import ahead

HEAVIEST = 20
"""Kernels that are shown."""


def parse():
    parser = cli.Parser(description=__doc__)
    names = ", ".join(targets.CARDS)
    about = f"cards and how many of them, such as h100, h100:8x8 (hosts x GPUs) or v5e:2x2: {names}"
    parser.add_argument("--target", nargs="+", required=True, metavar="CARD[:SHAPE]", help=about)
    about = "compile an evaluation step instead of a training step"
    parser.add_argument("--evaluation", action="store_true", help=about)
    about = "search for the largest batch that fits, by compiling two programs at a time"
    how = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--largest-batch", help=about, **how)
    for flag, what in (("--json", "the figures to FILE as JSON; - is stdout"),
                       ("--plot", "a picture of the bytes of each layer to FILE")):  # fmt: skip
        parser.add_argument(flag, type=Path, metavar="FILE", help=f"write {what}")
    cli.add_starting_points(parser)
    cli.add_config_flags(parser)
    args = parser.parse_args()
    output_files.check_picture("--plot", args.plot)
    data = places(args.dataset) if args.dataset else ()
    output_files.check_outputs({"--json": args.json, "--plot": args.plot}, data=data)
    words = [word for given in args.target for word in given.split(",") if word]
    args.targets = [targets.parse(word) for word in dict.fromkeys(words)]
    if not args.targets:
        raise InputError("--target names no target")
    return args


SIZES = {recipes.CIFAR10: 32, recipes.IMAGENETTE: 224}
"""{data set of a recipe, of 10 classes: the pixels a side that its images suggest}."""


def of_flags(config: TrainConfig, *, evaluation: bool = False) -> tuple[TrainConfig, ahead.Data]:
    """The config with what it leaves open filled in, and data as the flags describe them.

    Sizes and classes are those of the config, of the data set of a recipe, or those on which the
    network was published. Batches bring their own images.
    """
    dataset, small = config.data.dataset, config.model.arch == "basic_cnn"
    small |= config.model.arch in WITH_SHORTCUTS
    size = config.data.image_size or SIZES.get(dataset) or (32 if small else 224)
    classes = config.model.num_classes or (10 if small or dataset in SIZES else 1000)
    config = resolve(config, image_size=size, num_classes=classes)
    channels = 1 if config.data.grayscale else len(config.data.mean or "RGB")
    side = _side(config, evaluation)
    return config, ahead.Data((side, side, channels), resident=0)


def _side(config: TrainConfig, evaluation: bool) -> int:
    """Pixels a side of the images of a step: those of training may be smaller."""
    smaller = config.augment.random_resized_crop and not evaluation and config.data.train_size
    return smaller or config.data.image_size


def of_data(config: TrainConfig, *, evaluation: bool) -> tuple[TrainConfig, ahead.Data]:
    """The config as `train.py` resolves it for its data set, and the data that a step meets."""
    dataset = open_dataset(config.data)
    size = config.data.image_size or suggested_size(dataset)
    config = resolve(config, image_size=size, num_classes=len(dataset.class_names))
    resident = len(dataset.train) if "train" in that_fit(config, dataset) else 0
    side = _side(config, evaluation)
    return config, ahead.Data((side, side, dataset.channels), resident)


class Row(NamedTuple):
    """The compiled program and the largest batch of one target."""

    target: targets.Target
    num_devices: int

    program: ahead.Compiled | None
    """None if the compiler refused the program for want of memory."""

    largest_batch: int | None
    """None if it was not searched, or if no batch fits."""

    @property
    def fits(self) -> bool:
        """True if the program was compiled and is within the memory of the card."""
        return self.program is not None and self.program.fits


def planned(config: TrainConfig, data: ahead.Data, target: targets.Target, args) -> Row:
    """Compile for one target; where the program does not fit the largest batch is searched."""
    plan = ahead.Plan(config, data, target, evaluation=args.evaluation)
    compiled = plan.compile()
    search = args.largest_batch or compiled is None or not compiled.fits
    largest = ahead.largest_batch(plan, compiled) if search else None
    return Row(target, len(plan.engine.devices), compiled, largest)


def as_json(row: Row) -> dict:
    """The row of the JSON file; what only a compiled program tells is None without one."""
    return {
        "target": row.target.name,
        "devices": row.num_devices,
        "fits": row.fits,
        "peak_bytes": row.program and row.program.peak_bytes,
        "device_memory_bytes": row.target.card.memory_bytes,
        "largest_batch": row.largest_batch,
        **(figures(row.program) if row.program else dict.fromkeys(_FIGURES)),
    }


_FIGURES = (
    "flops_per_step", "bytes_per_step", "bound_images_per_second", "kernels", "collectives",
    "compile_seconds",
)  # fmt: skip


def figures(made: ahead.Compiled) -> dict:
    """{name of `_FIGURES`: the program's}"""
    collectives = program.collectives(made.kernels)
    values = (
        made.flops, made.bytes, made.bound_images_per_second, kinds(made), collectives,
        made.seconds,
    )  # fmt: skip
    return dict(zip(_FIGURES, values, strict=True))


def kinds(made: ahead.Compiled) -> dict[str, int]:
    """{kind: number of kernels that a call of the program executes}, the most frequent first."""
    counts = Counter()
    for kernel in made.kernels:
        counts[kernel.kind] += kernel.times
    return dict(counts.most_common())


def floor_bytes(config: TrainConfig, data: ahead.Data, num_devices: int) -> int:
    """The fewest bytes of a training step on each device (`models.floor`)."""
    library = dataclasses.replace(config.model, kernels="library")
    channels = data.image_shape[-1]
    model = nnx.eval_shape(lambda: create_from_config(library, in_channels=channels))
    itemsize = jnp.dtype(config.model.dtype).itemsize
    images = config.batch_size // num_devices
    return floor.passes(model, data.image_shape).bytes(images, itemsize)


def summary(rows: list[Row], floors: list[int | None]) -> Table:
    """A column for each target."""
    table = Table(title="of one device and one step; a bound is no speed")
    for name in ("", *(row.target.name for row in rows)):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    columns = [_column(row, lowest) for row, lowest in zip(rows, floors, strict=True)]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "-") for column in columns))
    return table


def _column(row: Row, lowest: int | None) -> dict[str, str]:
    made, memory = row.program, row.target.card.memory_bytes
    column = {"devices": f"{row.num_devices:,}", "fits": "yes" if row.fits else "NO"}
    if row.largest_batch:
        column["largest batch, all devices"] = f"{row.largest_batch:,}"
    if made is None:
        return column
    column |= {
        "batch, all devices": f"{made.batch_size:,}",
        "arguments, GB": f"{made.argument_bytes / 1e9:.2f}",
        "temporaries, GB": f"{made.temporary_bytes / 1e9:.2f}",
        "peak, GB": f"{made.peak_bytes / 1e9:.2f} of {memory / 1e9:.1f}",
        "TFLOPs of products": f"{made.flops / 1e12:.3f}",
        "bytes, GB": f"{made.bytes / 1e9:.2f}",
    }
    if lowest:
        ratio = f"{made.bytes / lowest:.2f}"
        column["floor of bytes, GB"] = f"{lowest / 1e9:.2f} (the program: {ratio} of it)"
    column["bound, images/s, all devices"] = f"{made.bound_images_per_second:,.0f}"
    column |= {f"kernels: {kind}": f"{count:,}" for kind, count in kinds(made).items()}
    for each in program.collectives(made.kernels):
        column[f"{each['kind']}, {each['dtype']}"] = (
            f"{each['count']:,} of {each['bytes'] / 1e6:.2f} MB, {each['in_forward']:,} forward"
        )
    return column | {"compiled in, s": f"{made.seconds:.0f}"}


def heaviest(made: ahead.Compiled) -> Table:
    """The kernels whose bounds are the longest."""
    table = Table(title=f"{made.target.name}: the kernels with the longest bounds, in us")
    for name in ("layer", "pass", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("times", "MB", "GFLOPs", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    card = made.target.card
    ranked = sorted(made.kernels, key=lambda kernel: -kernel.times * ahead.bound(kernel, card))
    for each in ranked[:HEAVIEST]:
        table.add_row(
            each.layer,
            each.phase,
            f"{each.kind} {each.dtype}",
            f"{each.times:,}",
            f"{each.bytes / 1e6:.1f}",
            f"{each.flops / 1e9:.1f}",
            f"{1e6 * ahead.bound(each, card):.0f}",
        )
    return table


def too_large(rows: list[Row]) -> str:
    """A line about the targets on which the program does not fit; "" if there are none."""
    lines = []
    for row in rows:
        if not row.fits:
            over = row.program.peak_bytes - row.target.card.memory_bytes if row.program else None
            by = f"by {over / 1e9:.2f} GB" if over else "says its compiler"
            fitting = f"the largest batch that fits is {row.largest_batch}"
            fitting = fitting if row.largest_batch else "no batch fits"
            lines.append(f"{row.target.name}: the program does not fit, {by}; {fitting}")
    return "; ".join(lines)


def main():
    args = parse()
    config = cli.build_config(args, TrainConfig())
    # A program for a device that is not here can be written into a cache but not read from it.
    environment.configure_jax(dataclasses.replace(config, compilation_cache=False))
    describe = of_data if args.dataset else of_flags
    config, data = describe(config, evaluation=args.evaluation)
    rows = [planned(config, data, target, args) for target in args.targets]
    floors = [
        None if args.evaluation else floor_bytes(config, data, row.num_devices) for row in rows
    ]
    made = [row.program for row in rows if row.program]
    if str(args.json) != "-":
        display = Display()
        images = "x".join(map(str, data.image_shape))
        classes = config.model.num_classes
        display.say(f"{config.model.arch}: images of {images}, {classes:,} classes")
        for table in (summary(rows, floors), *map(heaviest, made)):
            display.show(table)
    if args.json:
        document = {"targets": [as_json(row) for row in rows], "config": to_dict(config)}
        document["environment"] = environment.describe(num_devices=1)  # which compiled
        output_files.write_json(args.json, document)
    if args.plot:
        with replacing(args.plot) as place:
            plots.layer_bytes(place, {each.target.name: each.by_layer() for each in made})
    if line := too_large(rows):
        raise exits.CheckFailed(line)
