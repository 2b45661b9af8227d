"""Classify image files, and all images in folders, with a run or with the average of several runs.

python scripts/predict.py runs/resnet18-birds sparrow.jpg --top-k 3
python scripts/predict.py runs/resnet18-birds photos/ --json predictions.json
python scripts/predict.py runs/birds-1 runs/birds-2 photos/
python scripts/predict.py runs/resnet18-birds photos/ --on-bad-image skip --csv - | head
"""

import contextlib
import itertools
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from flax_resnet.commands import cli, exits, output_files
from flax_resnet.data.folders import images_below
from flax_resnet.data.image_files import BadImage, is_turned, reason
from flax_resnet.data.sources import AS_TRAINED, passed_over_remarks, turned_remark
from flax_resnet.errors import InputError
from flax_resnet.files import CsvRows
from flax_resnet.interop.ensemble import AVERAGES, ensemble
from flax_resnet.interop.loaded_run import predict_files
from flax_resnet.interop.weights_to_run import open_run
from flax_resnet.runs.checkpoint import steps_in
from flax_resnet.runs.views import is_begun
from flax_resnet.text import listed, printable, say
from flax_resnet.weights import published


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=cli.RUN_OR_NAME)
    about = "image files and folders; before them, more runs to average"
    parser.add_argument("inputs", nargs="+", metavar="IMAGE_OR_FOLDER", help=about)
    parser.add_argument("--average", metavar="KIND", help=cli.AVERAGE)
    parser.add_argument(
        "--top-k",
        type=int,
        default=5,
        metavar="INT",
        help="most probable classes to show (default: 5)",
    )
    parser.add_argument("--on-bad-image", default="error", metavar="error|skip", help=cli.BAD_IMAGE)
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    for flag, kind in (("--json", "JSON"), ("--csv", "CSV, a row for each class")):
        about = f"write the predictions to FILE as {kind}; - is stdout"
        parser.add_argument(flag, type=Path, metavar="FILE", help=about)
    args = parser.parse_args()
    if args.top_k < 1:
        raise InputError("--top-k: at least 1")
    cli.check_choice("--on-bad-image", args.on_bad_image, ("error", "skip"))
    more = list(itertools.takewhile(is_run, args.inputs))
    args.runs = cli.distinct([args.run_dir, *more])
    args.inputs = [Path(name) for name in args.inputs[len(more) :]]
    if not args.inputs:
        raise InputError(f"no image or folder follows the runs {listed(args.runs)}")
    args.average = cli.chosen_average(args.average, AVERAGES, args.runs)
    outputs = {"--json": args.json, "--csv": args.csv}
    output_files.check_outputs(outputs, args.runs)
    args.inputs, args.passed_over = image_files(args.inputs)
    output_files.check_outputs(outputs, args.inputs)
    return args


def is_run(name: str) -> bool:
    """Returns True for the directory of a run, and for the name of published weights."""
    return published.is_name(name) or is_begun(Path(name))


def image_files(inputs: list[Path]) -> tuple[list[Path], Counter[str]]:
    """The given files and the sorted images below the given folders, and the counts of what was
    passed over there, as in `folders.list_splits`."""
    files, passed_over = [], Counter()
    for path in inputs:
        if path.is_dir():
            _check_no_run(path)
            found, others = images_below(path)
            if not found:
                seen = "".join(f"; {remark}" for remark in passed_over_remarks(others))
                raise InputError(f"{path} has no images in it{seen}")
            files += map(Path, found)
            passed_over += others
        elif path.exists():
            files.append(path)
        else:
            before = "; a run's name goes before the images" if is_run(str(path)) else ""
            raise InputError(f"{path} does not exist{before}")
    return files, passed_over


def _check_no_run(folder: Path):
    """Raises InputError for a run, and for a folder of runs, whose pictures are plots."""
    if has_checkpoints(folder):
        raise InputError(f"{folder} is a run: it goes before the images")
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and has_checkpoints(path)]
    if inside:
        raise InputError(f"{folder} holds runs: name them before the images, as {inside[0]}")


def has_checkpoints(folder: Path) -> bool:
    """True for a run; a folder of images may have a config.json too."""
    return bool(steps_in(folder / "checkpoints"))


def as_row(path: Path, outcome: np.ndarray | BadImage, class_names, top_k: int) -> dict:
    """The `top_k` most probable classes of an image, best first, or why it is unreadable."""
    if isinstance(outcome, BadImage):
        return {"image": str(path), "error": reason(outcome)}
    order = np.argsort(-outcome, kind="stable")[:top_k]
    likely = [{"class": class_names[i], "probability": float(outcome[i])} for i in order]
    return {"image": str(path), "predictions": likely}


def print_row(row: dict):
    shown = row.get("error") or ", ".join(
        f"{printable(p['class'])} {p['probability']:.1%}" for p in row["predictions"]
    )
    say(f"{printable(row['image'])}: {shown}")


@contextlib.contextmanager
def json_rows(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yields a function that writes a row; the file is one JSON array of the rows."""
    with output_files.output(path) as file:
        before = "["

        def write(row: dict):
            nonlocal before
            file.write(
                f"{before}\n{textwrap.indent(json.dumps(row, indent=2, allow_nan=False), '  ')}"
            )
            before = ","

        yield write
        file.write("[]\n" if before == "[" else "\n]\n")


@contextlib.contextmanager
def csv_rows(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yields a function that writes a line for each class of a row, or one with its error."""
    with output_files.output(path) as file:
        table = CsvRows(file)
        table.write(["image", "rank", "class", "probability", "error"])

        def write(row: dict):
            for rank, p in enumerate(row.get("predictions", ()), 1):
                table.write([row["image"], rank, p["class"], p["probability"], ""])
            if "error" in row:
                table.write([row["image"], "", "", "", row["error"]])

        yield write


def write_all(rows: Iterable[dict], json_path: Path | None, csv_path: Path | None) -> int:
    """Write each row to the given files, or print it, as it comes; returns the number of errors.

    Raises:
      NoReader: all rows go to standard output, and nobody reads it.
    """
    to_a_file = any(path and str(path) != "-" for path in (json_path, csv_path))
    with contextlib.ExitStack() as files:
        outputs = ((json_rows, json_path), (csv_rows, csv_path))
        write = [files.enter_context(rows_of(path)) for rows_of, path in outputs if path]
        left_out = 0
        for row in rows:
            left_out += "error" in row
            for function in write or [print_row]:
                function(row)
            if not to_a_file:
                exits.check_read()
    return left_out


def main():
    args = parse()
    runs = {name: open_run(name) for name in args.runs}
    if args.fold_batchnorm:
        runs = {name: run.without_batchnorm() for name, run in runs.items()}
    run = ensemble(runs, args.average)
    files = args.inputs
    outcomes = predict_files(run, files, skip_bad=args.on_bad_image == "skip")
    rows = (as_row(path, outcome, run.class_names, args.top_k) for path, outcome in outcomes)
    left_out = write_all(rows, args.json, args.csv)
    say(*passed_over_remarks(args.passed_over), file=sys.stderr)
    if left_out:
        say(f"left out: {left_out:,} of {len(files):,} images", file=sys.stderr)
    if left_out == len(files):
        raise exits.CheckFailed("no image can be read")
    if not run.config.data.exif_transpose and (turned := sum(map(is_turned, files))):
        say(turned_remark(turned, len(files), AS_TRAINED), file=sys.stderr)
