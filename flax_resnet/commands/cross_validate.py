"""Train once for each fold of a cross-validation and pool what the runs predict on their folds.

python scripts/cross_validate.py --folds 5 --arch resnet20 --epochs 20
python scripts/cross_validate.py --folds 5 --dataset folder:DIR --run-dir runs/birds-cv

The images of a fold are the test split of one run, which does not train or validate on them. The
command writes the runs fold-0, fold-1, ... and, for all folds together, cross_validation.json,
predictions.csv, curves.png and confusion_matrix.png. To continue after an interruption, give the
same command again.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from flax_resnet.commands import cli, evaluate, exits, outcomes, output_files, train
from flax_resnet.commands.outcomes import Pool
from flax_resnet.config import TrainConfig, resolve
from flax_resnet.data.prepare import check_contents, class_weights, contents, suggested_size
from flax_resnet.data.sources import open_dataset, same_place
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.runs import environment, views
from flax_resnet.runs.directory import check_root, check_usable, default_name
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import class_names, is_begun, read_config
from flax_resnet.training import fit

SUMMARY = "cross_validation.json"
PICTURES = ("confusion_matrix.png", "curves.png")
SHOWN = ("loss", "accuracy", "precision_macro", "recall_macro", "f1_macro")


def parse():
    parser = cli.Parser(description=__doc__)
    cli.add_starting_points(parser)
    about = "directory of all runs (default: runs/ARCH-DATASET-K-folds)"
    parser.add_argument("--run-dir", metavar="PATH", type=Path, help=about)
    cli.add_config_flags(parser, hidden=("fold",))
    args = parser.parse_args()
    if args.fold is not None:
        raise InputError("--fold is a flag of train: this command runs all folds")
    args.fold = "0"
    return args


def configs(args) -> list[TrainConfig]:
    """The config of each fold's run, for images of one size in all folds."""
    config = train.config_with_weights(args)
    if config.data.image_size is None:
        size = resolved_size(config)
        config = replace(config, data=replace(config.data, image_size=size))
    folds = range(config.data.folds)
    return [replace(config, data=replace(config.data, fold=fold)) for fold in folds]


def resolved_size(config: TrainConfig) -> int:
    """The image size that the first fold suggests; its first image is not that of all folds."""
    dataset = open_dataset(config.data)
    size, classes = suggested_size(dataset), len(dataset.class_names)
    return resolve(config, image_size=size, num_classes=classes).data.image_size


def check_source(root: Path, source: str | None, dataset: str):
    """Raises InputError if the folds would begin with weights of one of them, or of another run on
    the same data."""
    seen = source and root.resolve() in Path(source).resolve().parents
    if source and is_begun(Path(source)):
        divided = views.divided(views.document_of(Path(source)))
        seen |= bool(divided) and same_place(divided["dataset"], dataset)
    if seen:
        raise InputError(f"--init-from {source} has seen images on which folds are tested")


def check(root: Path, runs: dict[Path, TrainConfig]):
    """Raises InputError, before anything is trained, where files would be replaced that no
    cross-validation has written, or where a fold was begun with other settings."""
    check_root(root, "the folds")
    for path in (root / name for name in (SUMMARY, *PICTURES, "predictions.csv")):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise InputError(f"{path} is no regular file; move it")
    if not os.path.lexists(root / SUMMARY):  # no cross-validation has ended here
        for name in (*PICTURES, "predictions.csv"):
            if os.path.lexists(root / name):
                raise InputError(f"{root / name} is of no cross-validation; move it")
    for run_dir, config in runs.items():
        check_usable(run_dir, resume=True, overwrite=False)
        if is_begun(run_dir):
            own = read_config(run_dir, say=lambda line: None)
            train.check_settings(run_dir, config, own, "give another --run-dir")


def trained(config: TrainConfig, run_dir: Path):
    """Train a fold's run, or the rest of it; InputError if the data of a finished one changed."""
    if is_begun(run_dir) and train.is_finished(run_dir):
        dataset = open_dataset(config.data)
        weights = class_weights(config.optimizer.class_weights, dataset)
        check_contents(contents(dataset, weights), load_run(run_dir).contents)
        return
    fit.fit(config, run_dir, resume=True, command=exits.command_line())


class OfFold(NamedTuple):
    """Takes the rows of one fold, which go to the pool and, with the fold, to the table."""

    fold: int
    pool: Pool
    write: outcomes.Write

    def add(self, rows: list[dict], batch: dict):
        self.write([row | {"fold": self.fold} for row in rows])
        self.pool.add(rows)


def predictions(run_dir: Path, place: str, each: OfFold) -> dict:
    """The figures of a run's fold.

    Args:
      place: where the data set is now.
    """
    run = load_run(run_dir)
    data = replace(run.config.data, dataset=place)
    run = replace(run, config=replace(run.config, data=data))
    dataset = evaluate.open_data(run, None, "test")
    figures, _ = evaluate.measure(run, dataset, "test", None, each)
    return figures


def all_predictions(root: Path, folders: list[Path], place: str) -> tuple[list[dict], Pool]:
    """The figures of each fold, and the pool of all, of which predictions.csv is written."""
    columns, pool = (*outcomes.COLUMNS, "fold"), Pool(class_names(folders[0]))
    with outcomes.csv_rows(root / "predictions.csv", columns) as write:
        figures = [
            predictions(folder, place, OfFold(fold, pool, write))
            for fold, folder in enumerate(folders)
        ]
    return figures, pool


def spread(figures: list[dict]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) over the folds."""
    columns = {name: [fold[name] for fold in figures] for name in SHOWN}
    return {
        "mean": {name: float(np.mean(values)) for name, values in columns.items()},
        "deviation": {name: float(np.std(values, ddof=1)) for name, values in columns.items()},
    }


def table(figures: list[dict], whole: dict[str, dict]) -> Table:
    """A row for each fold, then mean, deviation and pooled figures."""
    found = Table(caption="pooled: of all predictions together", caption_justify="left")
    for header in ("fold", *(name.removesuffix("_macro") for name in SHOWN)):
        found.add_column(header, justify="left" if header == "fold" else "right")
    for name, values in (dict(enumerate(figures)) | whole).items():
        found.add_row(str(name), *(f"{values[column]:.4f}" for column in SHOWN))
    return found


def main():
    args = parse()
    if args.folds is None:
        raise InputError("--folds is missing: the number of parts, such as 5")
    runs = configs(args)
    root = args.run_dir or Path("runs") / f"{default_name(runs[0])}-{len(runs)}-folds"
    folders = [root / f"fold-{number}" for number in range(len(runs))]
    check_source(root, runs[0].init_from, runs[0].data.dataset)
    check(root, dict(zip(folders, runs, strict=True)))
    for config, folder in zip(runs, folders, strict=True):
        trained(config, folder)
    figures, pool = all_predictions(root, folders, runs[0].data.dataset)
    whole = spread(figures) | {"pooled": pool.figures()}
    Display().show(table(figures, whole))
    courses = {folder.name: views.rows(folder) for folder in folders}
    facts = {"folds": figures, **whole, "images": int(pool.counts.sum())}
    write(root, facts, pool.counts, pool.names, courses)


def write(root: Path, values: dict, counts: np.ndarray, names, courses: dict):
    """Write the files about all folds."""
    from flax_resnet.runs import plots  # here, because importing Matplotlib takes a second

    facts = {"class_names": names, "confusion": counts.tolist()}
    facts |= {"command": exits.command_line(), "environment": environment.describe(1)}
    output_files.write_json(root / SUMMARY, values | facts)
    confusion, curves = (root / name for name in PICTURES)
    with replacing(confusion) as place:
        plots.confusion_matrix(place, counts, names)
    with replacing(curves) as place:
        plots.comparison(place, courses, f"{len(courses)} folds")
