"""Classify images with a run: files, or folders of them.

python scripts/predict.py runs/resnet18-birds sparrow.jpg --top-k 3
python scripts/predict.py runs/resnet18-birds photos/ --json predictions.json
"""

import csv
import json
from pathlib import Path

import numpy as np
from rich.table import Table

from flax_resnet import cli
from flax_resnet.config import InputError
from flax_resnet.data.image_files import SUFFIXES
from flax_resnet.display import Display
from flax_resnet.serve import load_run, predict_files


def parse():
    parser = cli.Parser(prog="predict.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="classes an image")
    parser.add_argument("--fold-batchnorm", action="store_true", help=cli.FOLD_BATCHNORM)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write them there, a row a class")
    args = parser.parse_args()
    if args.top_k < 1:
        raise InputError("--top-k: at least 1")
    cli.check_writable("--json", args.json)
    cli.check_writable("--csv", args.csv)
    return args


def image_files(inputs: list[Path]) -> list[Path]:
    """The files as given, and the visible images below the folders, sorted."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if is_visible_image(p.relative_to(path)))
            if not found:
                raise InputError(f"{path} has no images in it")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist")
    return files


def is_visible_image(path: Path) -> bool:
    """As in training: neither the file nor a folder on the way to it is hidden."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def top_classes(probabilities: np.ndarray, class_names, top_k: int) -> list[dict]:
    """The likeliest classes, likeliest first."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [{"class": class_names[i], "probability": float(probabilities[i])} for i in order]


def show(rows: list[dict]):
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("classes")
    for row in rows:
        best = ", ".join(f"{p['class']} {p['probability']:.1%}" for p in row["predictions"])
        table.add_row(row["image"], best)
    Display().show(table)


def write_csv(path: Path, rows: list[dict]):
    with path.open("w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])
        for row in rows:
            for rank, p in enumerate(row["predictions"], 1):
                writer.writerow([row["image"], rank, p["class"], p["probability"]])


def main():
    args = parse()
    run = load_run(args.run_dir)
    run = run.without_batchnorm() if args.fold_batchnorm else run
    predictions = predict_files(run, image_files(args.inputs))
    rows = [
        {"image": str(path), "predictions": top_classes(p, run.class_names, args.top_k)}
        for path, p in predictions
    ]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    if args.csv:
        write_csv(args.csv, rows)
    if not (args.json or args.csv):
        show(rows)


if __name__ == "__main__":
    cli.run_command(main)
