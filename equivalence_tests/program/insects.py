"""Ants and bees: a small image folder, and trainings on it."""

import numpy as np
from PIL import Image

from equivalence_tests.program.command import run_script

CLASSES = ("ant", "bee")


def write_folder(root, *, per_class=12, splits=("train", "test"), size=12):
    """Class folders of small PNGs; bees are brighter than ants."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 100, (size, size, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


def train_on(folder, run_dir, *arguments):
    arguments = ["--dataset", f"folder:{folder}", "--batch-size", 8, *arguments]
    return run_script(
        "train.py", "--arch", "basic_cnn", "--devices", 1, "--run-dir", run_dir, *arguments,
        "--optimizer", "adam", "--lr", 0.003,
    )  # fmt: skip
