"""Evaluate a run on a split of its own data set or of another one with the same classes.

python scripts/evaluate.py runs/resnet18-digits
python scripts/evaluate.py runs/resnet18-birds --dataset folder:/data/new-birds --split all
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_resnet.commands import cli
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import SPLITS, check_contents, contents, evaluation_decoder
from flax_resnet.data.sources import AS_TRAINED, open_dataset
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import LoadedRun, load_run
from flax_resnet.runs.display import Display
from flax_resnet.text import listed
from flax_resnet.training import steps
from flax_resnet.training.evaluation import evaluate


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")
    splits = (*SPLITS, "all")
    parser.add_argument(
        "--split", default="test", metavar="|".join(splits), help="split to use (default: test)"
    )
    parser.add_argument("--dataset", metavar="NAME[:PATH]", help="data set (default: the run's)")
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    parser.add_argument("--on-bad-image", default="error", metavar="error|skip", help=cli.BAD_IMAGE)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to FILE; - is stdout"
    )
    args = parser.parse_args()
    cli.check_choice("--split", args.split, splits)
    cli.check_choice("--on-bad-image", args.on_bad_image, ("error", "skip"))
    cli.check_writable("--json", args.json, [args.run_dir])
    return args


def open_data(run: LoadedRun, name: str | None, split: str):
    """The data set, opened with the run's settings; InputError if its classes or channels differ,
    or the run's own data have changed, whose new split could have training images in the test."""
    data = run.config.data
    if name:
        data = replace(data, dataset=name, train_images=None, eval_images=None)
    if name and split == "all":  # nothing is cut off, however few images there are
        data = replace(data, test_fraction=0.0, validation_fraction=0.0)
    dataset = open_dataset(data)
    if not name:
        check_contents(contents(dataset), run.contents)
    if sorted(dataset.class_names) != sorted(run.class_names):
        raise InputError(
            f"{data.dataset} has the classes {listed(dataset.class_names)}; the run was"
            f" trained on {listed(run.class_names)}"
        )
    if dataset.channels != run.channels:
        raise InputError(f"{data.dataset} has {dataset.channels} channels, the run {run.channels}")
    return dataset


def measure(run: LoadedRun, dataset, split: str, left_out: list | None) -> tuple[dict, int]:
    """The figures of a split and its number of images; `left_out` takes errors of unreadable
    ones."""
    sources = [getattr(dataset, name) for name in (SPLITS if split == "all" else (split,))]
    num_images = sum(map(len, sources))
    if not num_images:
        raise InputError(f"the {split} split is empty")
    parallel = replace(run.config.parallel, devices=1)
    engine = Engine(parallel, kernels=run.config.model.kernels)
    eval_step = steps.make_eval_step(run.network, run.preprocess, num_classes=len(run.class_names))
    decoder, size = evaluation_decoder(run.config.data), run.config.eval_batch_size
    batches = itertools.chain.from_iterable(
        pipeline.evaluation_batches(source, decoder, size, left_out=left_out) for source in sources
    )
    order = np.array([run.class_names.index(name) for name in dataset.class_names])
    batches = (batch | {"label": order[batch["label"]]} for batch in batches)
    figures, _ = evaluate(engine, engine.compile_eval(eval_step), run.variables, batches)
    return figures, num_images - len(left_out or ())


def main():
    args = parse()
    run = load_run(args.run_dir)
    run = run.without_batchnorm() if args.fold_batchnorm else run
    dataset = open_data(run, args.dataset, args.split)
    left_out = [] if args.on_bad_image == "skip" else None
    figures, num_images = measure(run, dataset, args.split, left_out)
    if not math.isfinite(figures["loss"]):
        raise cli.CheckFailed(f"{args.run_dir}: the loss is {figures['loss']}, not a number")
    display = Display(stderr=str(args.json) == "-")
    for line in dataset.remarks(AS_TRAINED):
        display.say(line)
    for error in left_out or ():
        display.say(f"left out: {error}")
    name = args.dataset or run.config.data.dataset
    display.say(f"{args.split}: {num_images:,} images of {name}")
    display.results({args.split: figures}, len(run.class_names))
    if args.json:
        figures |= {"split": args.split, "images": num_images, "command": cli.command_line()}
        bad = [*map(": ".join, dataset.bad_images), *map(str, left_out or ())]
        figures |= {"left_out_images": len(bad), "left_out": bad}
        with cli.output(args.json) as file:
            file.write(json.dumps(figures, indent=2, allow_nan=False) + "\n")
