"""Measures what a JPEG copy of a data set costs: the same images, lossless and as JPEG files.

python -m equivalence_tests.studies.copy_cost LOSSLESS JPEG --seed 1  # adds the seed to the results

Both folders hold a folder of images per class. A lossless image is paired with the JPEG file of its
class that is nearest to it. A ResNet-20 is cross-validated on both sets with the same folds and the
same seed. Over all seeds so far, a paired t-test asks whether the accuracies of the folds differ by
more than chance explains.
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest, sem, ttest_rel

from equivalence_tests import results
from equivalence_tests.studies import digits
from flax_resnet import machine

NAME = "copy-cost"
KINDS = ("lossless", "jpeg")
FLAGS = ("--arch", "resnet20", "--image-size", 32, "--epochs", 30, "--horizontal-flip", 0.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lossless", type=Path, help="folder of class folders of lossless images")
    parser.add_argument("jpeg", type=Path, help="folder of class folders of the JPEG copy")
    about = "directory of the pairs and the runs, which go on where they were cut off"
    parser.add_argument("--runs", type=Path, default=Path("runs/copy-cost"), help=about)
    parser.add_argument("--seed", type=int, default=0, help="seed of the ten trainings")
    args = parser.parse_args()
    levels = copy_pairs(args.lossless, args.jpeg, args.runs)
    found = cross_validate(args.runs, args.seed)
    seeds = dict(sorted((results.known(NAME, "seeds") | {str(args.seed): found}).items()))
    document = {
        "command": "python -m equivalence_tests.studies.copy_cost LOSSLESS JPEG --seed N",
        "images": len(levels),
        "mean_absolute_difference_in_levels": float(np.mean(levels)),
        "flags": " ".join(map(str, FLAGS)),
        **cost(list(seeds.values())),
    }
    results.write(NAME, document | {"seeds": seeds})


def cross_validate(root: Path, seed: int) -> dict:
    """Figures of the folds of root/lossless and root/jpeg, and of the comparison of the two."""
    found = {"device": machine.processor(), "revision": machine.revision()}
    tables = []
    for kind in KINDS:
        runs = root / f"{kind}-seed{seed}"
        data = ("--dataset", f"folder:{root / kind}")
        found[kind] = digits.folds(runs, *data, *FLAGS, "--seed", seed)
        tables.append(runs / "predictions.csv")
    return found | paired(*tables)


def cost(seeds: list[dict]) -> dict[str, float]:
    """By how much the JPEG files lower the accuracy of a fold: mean, standard error, and p of the
    paired t-test, over all folds of all seeds."""
    lossless, jpeg = (
        np.array([fold["accuracy"] for found in seeds for fold in found[kind]["alone"]])
        for kind in KINDS
    )
    lost = lossless - jpeg
    p = ttest_rel(lossless, jpeg).pvalue
    return {"accuracy_lost": float(lost.mean()), "error": float(sem(lost)), "p": float(p)}


def paired(lossless: Path, jpeg: Path) -> dict:
    """Count the images whose prediction is correct from one set alone, and test with McNemar's
    exact test whether the two counts differ by more than chance.

    Args:
      lossless, jpeg: the files predictions.csv of two cross-validations.
    """
    exact, copy = right(lossless), right(jpeg)
    if exact.keys() != copy.keys():
        raise ValueError("the two sets do not hold the same images")
    return mcnemar(*(np.array([rights[name] for name in exact]) for rights in (exact, copy)))


def mcnemar(exact: np.ndarray, copy: np.ndarray) -> dict:
    """McNemar's exact test of which images, bool [N], were predicted correctly from two files."""
    alone = [int((exact & ~copy).sum()), int((copy & ~exact).sum())]
    p = binomtest(alone[0], sum(alone)).pvalue if any(alone) else 1.0
    return {"right_in_lossless_alone": alone[0], "right_in_jpeg_alone": alone[1], "p": float(p)}


def right(predictions: Path) -> dict[str, bool]:
    """{CLASS/NAME: whether the prediction is correct}; names are without their suffixes."""
    with open(predictions, encoding="utf-8", newline="") as file:
        return {
            f"{row['label']}/{Path(row['path']).stem}": row["prediction"] == row["label"]
            for row in csv.DictReader(file)
        }


def copy_pairs(lossless: Path, jpeg: Path, root: Path) -> list[float]:
    """Copies each lossless image to root/lossless and its JPEG file to root/jpeg, under the same
    name; returns the mean absolute differences of the pairs, in levels of 0 to 255."""
    levels = []
    for folder in sorted(path for path in lossless.iterdir() if path.is_dir()):
        exact, copies = (sorted((top / folder.name).iterdir()) for top in (lossless, jpeg))
        left, right = pixels(exact), pixels(copies)
        for path, image, match in zip(exact, left, nearest(left, right), strict=True):
            levels.append(np.abs(image - right[match]).mean())
            for kind, source in (("lossless", path), ("jpeg", copies[match])):
                target = root / kind / folder.name / f"{path.stem}{source.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    return levels


def pixels(paths: list[Path]) -> np.ndarray:
    """The images as float32 of shape [N, H * W * 3]."""
    return np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32).ravel()
                     for path in paths])  # fmt: skip


def nearest(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Numbers [N] of the rows of `right` [M, D] that are nearest to the rows of `left` [N, D].

    Raises:
      ValueError: a row of `right` is the nearest of two rows.
    """
    squares = (right**2).sum(axis=1) - 2 * left @ right.T
    found = squares.argmin(axis=1)
    if len(set(found)) < len(found):
        raise ValueError("two lossless images have the same nearest copy")
    return found


if __name__ == "__main__":
    main()
