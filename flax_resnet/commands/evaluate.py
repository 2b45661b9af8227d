"""Evaluate a run on a split of its own data set or of another one with the same classes.

If several runs are given, each is evaluated alone, and then their ensemble, which averages what
they predict.

python scripts/evaluate.py runs/resnet18-digits
python scripts/evaluate.py runs/digits-1 runs/digits-2 runs/digits-3
python scripts/evaluate.py runs/resnet18-birds --dataset folder:/data/new-birds --split all
python scripts/evaluate.py runs/resnet18-birds --predictions test.csv --worst worst.html
python scripts/evaluate.py runs/resnet18-birds --split validation --confusion-matrix confusion.png
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from flax_resnet.commands import cli, exits, outcomes, output_files
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import SPLITS, check_contents, contents, evaluation_decoder
from flax_resnet.data.sources import AS_TRAINED, DataSet, open_dataset, places, same_place
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.interop.ensemble import AVERAGES, ensemble
from flax_resnet.interop.loaded_run import LoadedRun
from flax_resnet.interop.weights_to_run import open_run
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import warn
from flax_resnet.text import listed
from flax_resnet.training import steps
from flax_resnet.training.evaluation import evaluate, inputs_of, make_outcomes
from flax_resnet.weights import published


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=cli.RUN_OR_NAME)
    parser.add_argument("--average", metavar="KIND", help=cli.AVERAGE)
    splits = (*SPLITS, "all")
    parser.add_argument(
        "--split", default="test", metavar="|".join(splits), help="images to use (default: test)"
    )
    parser.add_argument("--dataset", metavar="NAME[:PATH]", help="data set (default: the run's)")
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    parser.add_argument("--on-bad-image", default="error", metavar="error|skip", help=cli.BAD_IMAGE)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to FILE; - is stdout"
    )
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write a CSV file, a row for each image"
    )
    parser.add_argument(
        "--worst",
        type=Path,
        metavar="FILE",
        help="write an HTML page of the images of largest loss",
    )
    parser.add_argument(
        "--confusion-matrix", type=Path, metavar="FILE.png", help="draw the confusion matrix"
    )
    args = parser.parse_args()
    output_files.check_picture("--confusion-matrix", args.confusion_matrix)
    cli.check_choice("--split", args.split, splits)
    args.average = cli.chosen_average(args.average, AVERAGES, args.run_dirs)
    cli.check_choice("--on-bad-image", args.on_bad_image, ("error", "skip"))
    data = places(args.dataset) if args.dataset else ()
    output_files.check_outputs(outputs(args), args.run_dirs, data)
    return args


def outputs(args) -> dict[str, Path | None]:
    """{flag: the file that it names}"""
    files = {f"--{name}": getattr(args, name) for name in ("json", "predictions", "worst")}
    return files | {"--confusion-matrix": args.confusion_matrix}


def open_data(run: LoadedRun, name: str | None, split: str):
    """The data set, opened with the run's settings; InputError if the run's own data have changed,
    whose new split could have training images in the test."""
    if name:
        return _open_named(run, name, split)
    dataset = open_dataset(run.config.data)
    check_contents(contents(dataset), run.contents)
    return dataset


def _open_named(run: LoadedRun, name: str, split: str):
    """A data set, all images of it. The images of the run's own data keep the run's fold; if these
    data have changed, only a test split that they bring along is evaluated."""
    data = replace(run.config.data, dataset=name)
    if same_place(run.config.data.dataset, name) and split != "all":
        dataset = open_dataset(data)
        if data.folds or split not in dataset.own_splits:
            check_contents(contents(dataset), run.contents)
    if data.folds and split != "all":
        with contextlib.suppress(InputError):  # other data, perhaps with too few images to fold
            dataset = open_dataset(data)
            if run.contents:
                check_contents(contents(dataset), run.contents)
                return dataset
    whole = dict.fromkeys(("train_images", "eval_images", "folds", "fold"))
    if split == "all":  # nothing is cut off, however few images there are
        whole |= {"test_fraction": 0.0, "validation_fraction": 0.0}
    return open_dataset(replace(data, **whole))


def with_names_of(dataset, run: LoadedRun) -> LoadedRun:
    """The run with the class names of the data if they have as many other ones: folders of ImageNet
    are n01440764, n01443537, ... and in the order of the published classes."""
    names = dataset.class_names
    if sorted(names) == sorted(run.class_names) or len(names) != len(run.class_names):
        return run
    warn(f"the classes have other names in the data: they are taken in order, {listed(names, 2)}")
    return replace(run, class_names=tuple(names))


def check_classes(run: LoadedRun, dataset, name: str, run_name: str = "the run"):
    """Raises InputError if the data have other classes or channels than the run.

    Args:
      name: that of the data.
      run_name: the run in the message.
    """
    if sorted(dataset.class_names) != sorted(run.class_names):
        raise InputError(
            f"{name} has the classes {listed(dataset.class_names)}; {run_name} was"
            f" trained on {listed(run.class_names)}"
        )
    if dataset.channels != run.channels:
        raise InputError(f"{name} has {dataset.channels} channels, {run_name} {run.channels}")


class TakesRows(Protocol):
    def add(self, rows: list[dict], batch: dict):
        """Take the rows of a batch of images."""


class Outcomes:
    """Writes the rows of all images as they come, counts their classes, and keeps the pictures of
    the worst."""

    def __init__(self, write: outcomes.Write, class_names: tuple[str, ...]):
        self._write, self.worst, self.pool = write, outcomes.Worst(), outcomes.Pool(class_names)

    def add(self, rows: list[dict], batch: dict):
        self._write(rows)
        self.pool.add(rows)
        self.worst.add(rows, batch["image"][batch["mask"]])


def measure(
    run: LoadedRun,
    dataset: DataSet,
    split: str,
    left_out: list | None,
    each: TakesRows | None = None,
) -> tuple[dict, int]:
    """The figures of a split and its number of images.

    Args:
      left_out: takes errors of unreadable images.
      each: takes what is known of each image.
    """
    names = SPLITS if split == "all" else (split,)
    num_images = sum(len(getattr(dataset, name)) for name in names)
    if not num_images:
        raise InputError(f"the {split} split is empty")
    parallel = replace(run.config.parallel, devices=1)
    engine = Engine(parallel, kernels=run.config.model.kernels)
    eval_step = steps.make_eval_step(run.network, run.preprocess, num_classes=len(run.class_names))
    decoder, size = evaluation_decoder(run.config.data), run.config.eval_batch_size
    order = np.array([run.class_names.index(name) for name in dataset.class_names])
    outcome = engine.compile_eval(make_outcomes(run.network, run.preprocess))

    def batches():
        for name in names:
            source = getattr(dataset, name)
            naming = outcomes.naming(source, name)
            for batch in pipeline.evaluation_batches(source, decoder, size, left_out=left_out):
                batch["label"] = order[batch["label"]]
                if each is not None:
                    found = jax.device_get(outcome(run.variables, inputs_of(batch)))
                    each.add(outcomes.rows(batch, found, naming, run.class_names), batch)
                yield batch

    figures, *_ = evaluate(engine, engine.compile_eval(eval_step), run.variables, batches())
    return figures, num_images - len(left_out or ())


def opened(name: str, args) -> tuple[LoadedRun, DataSet]:
    """A run, and the data set as the run divides it."""
    run = open_run(name)
    if published.is_name(name) and not args.dataset:
        raise InputError(f"{name} has no data of its own: give --dataset")
    dataset = open_data(run, args.dataset, args.split)
    if published.is_name(name):
        run = with_names_of(dataset, run)
    check_classes(run, dataset, args.dataset or run.config.data.dataset, name)
    return run.without_batchnorm() if args.fold_batchnorm else run, dataset


def _in_common(dataset: DataSet, args):
    """The facts that have to be equal for all runs: those of the images of the split. For "all"
    they are those of every split, or None for data named by --dataset, which nothing divides."""
    facts = contents(dataset)
    if args.split == "all":
        return None if args.dataset else facts
    return {name: fact for name, fact in facts.items() if name.startswith(f"{args.split} ")}


def opened_all(names: list[str], args) -> tuple[dict[str, LoadedRun], LoadedRun, DataSet]:
    """The runs, their ensemble and their common data.

    Raises:
      InputError: the runs make no ensemble, or divide their data differently.
    """
    found = {name: opened(name, args) for name in names}
    runs = {name: run for name, (run, _) in found.items()}
    joined = ensemble(runs, args.average)
    first = found[names[0]][1]
    for name, (_, dataset) in found.items():
        if _in_common(dataset, args) != _in_common(first, args):
            raise InputError(
                f"{name} divides its data otherwise than {names[0]}, whose test images may be"
                " training images there; give images that no run has seen, with --dataset DATA"
                " --split all"
            )
    return runs, joined, first


def check_finite(name: str, figures: dict):
    """Raises CheckFailed if the loss is no number."""
    if not math.isfinite(figures["loss"]):
        raise exits.CheckFailed(f"{name}: the loss is {figures['loss']}, not a number")


def measured(run: LoadedRun, dataset: DataSet, args, left_out: list | None, name: str):
    """The figures of a run called `name`, its number of images and their outcomes, which are None
    where no flag asks for them. The table of the predictions is written meanwhile, and gets its
    name if the loss is a number."""
    with contextlib.ExitStack() as files:
        each = None
        if args.predictions:
            write = files.enter_context(outcomes.csv_rows(args.predictions))
            each = Outcomes(write, run.class_names)
        elif args.worst or args.confusion_matrix:
            each = Outcomes(lambda rows: None, run.class_names)
        figures, num_images = measure(run, dataset, args.split, left_out, each)
        check_finite(name, figures)
    return figures, num_images, each


def draw(path: Path, pool: outcomes.Pool):
    """Draw the confusion matrix of the counted classes."""
    from flax_resnet.runs import plots  # here, because importing Matplotlib takes a second

    with replacing(path) as place:
        plots.confusion_matrix(place, pool.counts, pool.names)


def main():
    args = parse()
    names = cli.distinct(args.run_dirs)
    runs, run, dataset = opened_all(names, args)
    read = [args.dataset or run.config.data.dataset for run in runs.values()]
    data = [place for name in read for place in places(name)]
    output_files.check_outputs(outputs(args), data=data)
    several = len(runs) > 1
    skip = args.on_bad_image == "skip"
    members = [
        measure(member, dataset, args.split, [] if skip else None)[0]
        for member in (runs.values() if several else ())
    ]
    for name, values in zip(names, members, strict=False):
        check_finite(name, values)
    left_out = [] if skip else None
    subject = "ensemble" if several else names[0]
    figures, num_images, each = measured(run, dataset, args, left_out, subject)
    table = dict(zip(names, members, strict=True)) if several else {}
    title = subject if several else args.split
    if title in table:  # a run may be called "ensemble"
        title = "all together"
    table[title] = figures
    display = Display(stderr="-" in map(str, (args.json, args.predictions, args.worst)))
    for line in dataset.remarks(AS_TRAINED):
        display.say(line)
    for error in left_out or ():
        display.say(f"left out: {error}")
    name = args.dataset or run.config.data.dataset
    display.say(f"{args.split}: {num_images:,} images of {name}")
    display.results(table, len(run.class_names))
    if args.worst:
        title = f"The largest losses of {listed(names)}, {args.split} split of {name}"
        outcomes.write_page(args.worst, each.worst, title)
    if args.confusion_matrix:
        draw(args.confusion_matrix, each.pool)
    if args.json:
        bad = [*map(": ".join, dataset.bad_images), *map(str, left_out or ())]
        facts = {"split": args.split, "images": num_images, "command": exits.command_line()}
        facts |= {"left_out_images": len(bad), "left_out": bad}
        if several:
            facts |= {"average": args.average, "members": dict(zip(names, members, strict=True))}
        output_files.write_json(args.json, figures | facts)
