"""Measures what stronger JPEG compression costs a training on all images of a copy in JPEG files.

python -m equivalence_tests.studies.reencoded JPEG --quality 30  # adds to results/reencoded.json

JPEG is a folder of splits with class folders. Its images are encoded again with a lower quality,
and a ResNet-20 is trained on them in PyTorch and tested on the test images of the same quality.
Without --quality, it is trained on the images as they are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from equivalence_tests import results
from flax_resnet import machine

NAME = "reencoded"
FLAGS = ("--recipe", "cifar10-resnet20-short", "--dtype", "bfloat16", "--compile", "--seed", "0")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jpeg", type=Path, help="folder of splits with class folders of images")
    parser.add_argument("--quality", type=int, help="Pillow's quality of the second encoding")
    about = "directory of images and runs, which go on where they were cut off"
    parser.add_argument("--runs", type=Path, default=Path("runs/reencoded"), help=about)
    args = parser.parse_args()
    images, levels = args.jpeg, 0.0
    if args.quality is not None:
        images = args.runs / f"images-{args.quality}"
        levels = reencode(args.jpeg, images, args.quality)
    run = args.runs / f"run-{args.quality}"
    words = [*FLAGS, "--dataset", f"folder:{images}", "--run-dir", str(run), "--resume"]
    subprocess.run([sys.executable, "-m", "torch_ref.train", *words], check=True)
    row = {"device": machine.processor(), "revision": machine.revision(), "levels": levels}
    row |= {"splits": json.loads((run / "report.json").read_text())["splits"]}
    command = "python -m equivalence_tests.studies.reencoded JPEG [--quality Q]"
    document = {"command": command, "flags": " ".join(FLAGS)}
    results.write(NAME, document | {"rows": results.known(NAME) | {str(args.quality): row}})


def reencode(source: Path, target: Path, quality: int) -> float:
    """Writes all images of `source` to `target`, encoded again with chroma at half the resolution;
    returns the mean absolute difference of their pixels, in levels of 0 to 255."""
    differences = []
    for path in sorted(source.glob("*/*/*")):
        image = Image.open(path).convert("RGB")
        place = target / path.relative_to(source).with_suffix(".jpg")
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place, quality=quality, subsampling="4:2:0")
        pixels = (np.asarray(each, np.float32) for each in (image, Image.open(place)))
        differences.append(np.abs(np.subtract(*pixels)).mean())
    return float(np.mean(differences))


if __name__ == "__main__":
    main()
