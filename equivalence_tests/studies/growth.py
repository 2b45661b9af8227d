"""Compares the cost of a folder of a million image files with that of 20,000.

python -m equivalence_tests.studies.growth  # 10 minutes, 1.2 million links

Measured are the time per image in training and in evaluation, the bytes sent to a worker process,
and time and memory until the first step. The files are links to a few small JPEGs. Writes
results/growth.json. Exit status: 1 if a bound is exceeded.
"""

import argparse
import functools
import itertools
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from equivalence_tests import results
from flax_resnet.commands import exits

ROOT = Path(__file__).parents[2]
SIZES = (20_000, 1_000_000)
CLASSES = 100
BATCHES, BATCH_SIZE = 100, 128
BOUNDS = {"growth": 1.5, "cpu_seconds_to_first_step": 60, "peak_mib_at_first_step": 1.2 * 1024}
PER_IMAGE = ("training", "evaluation", "evaluation_of_kept_images")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sizes", nargs=2, type=int, default=SIZES, metavar="FILES")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print("\n" + json.dumps(PARTS[args.part](args.folder), allow_nan=False), flush=True)
        return
    rows = [measured(size) for size in args.sizes]
    growth = {
        name: rows[1]["microseconds_an_image"][name] / rows[0]["microseconds_an_image"][name]
        for name in PER_IMAGE
    }
    results.write("growth", {"sizes": rows, "growth": growth, "bounds": BOUNDS})
    print(json.dumps(growth | rows[1], indent=1, allow_nan=False))
    if lines := over(rows[1], growth):
        raise exits.CheckFailed("; ".join(lines))


def over(large: dict, growth: dict) -> list[str]:
    """A line for each figure of the large folder, or of the growth, that exceeds its bound."""
    found = {f"growth of {name}": (value, BOUNDS["growth"]) for name, value in growth.items()}
    found |= {name: (large[name], bound) for name, bound in BOUNDS.items() if name != "growth"}
    return [
        f"{name} is {x:.3g}, over {bound:.3g}" for name, (x, bound) in found.items() if x > bound
    ]


def measured(size: int) -> dict:
    """Measures all parts on a folder of `size` files, each part in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), size)
        row = {"files": size}
        for part in PARTS:
            command = [sys.executable, "-m", __spec__.name, "--part", part, "--folder", folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr.strip())
            row |= json.loads(done.stdout.splitlines()[-1])
    return row


def write_folder(root: Path, size: int):
    """Write a folder of `size` files in CLASSES classes; all files of a class are links to one."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = root / f"class{number:03}"
        folder.mkdir()
        first = folder / "image-000000.jpg"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(first)
        for copy in range(1, size // CLASSES):
            os.link(first, folder / f"image-{copy:06}.jpg")


def costs(folder: str) -> dict:
    """CPU seconds to list and fingerprint the files, and microseconds per image."""
    from flax_resnet.config import DataConfig
    from flax_resnet.data import pipeline
    from flax_resnet.data.prepare import contents
    from flax_resnet.data.sources import open_dataset

    dataset, seconds = timed(lambda: open_dataset(DataConfig(dataset=f"folder:{folder}")))
    _, fingerprint_seconds = timed(lambda: contents(dataset))
    train, decoder = dataset.train, pipeline.Decoder(size=32, resize=32)
    order = pipeline.BatchOrder(num_images=len(train), batch_size=BATCH_SIZE, seed=0, epochs=1)
    batches = pipeline._DecodedBatches(train, decoder, order)
    kept = np.broadcast_to(np.uint8(0), (len(train), 1, 1, 3))
    batches[0]  # draws the order of the epoch
    evaluation = functools.partial(pipeline.evaluation_batches, train, decoder, BATCH_SIZE)
    ways = {
        "training": lambda: (batches[step] for step in range(1, BATCHES + 1)),
        "evaluation": lambda: itertools.islice(evaluation(), BATCHES),
        "evaluation_of_kept_images": lambda: evaluation(kept),
    }
    microseconds = {name: 1e6 * cost_of_an_image(way) for name, way in ways.items()}
    return {
        "cpu_seconds_to_open": seconds,
        "cpu_seconds_of_fingerprint": fingerprint_seconds,
        "microseconds_an_image": microseconds,
        "bytes_sent_to_a_worker": len(pickle.dumps(train)),
    }


def cost_of_an_image(batches) -> float:
    """CPU seconds per image, the minimum of three measurements."""
    counts, seconds = zip(
        *(timed(lambda: sum(1 for _ in batches())) for _ in range(3)), strict=True
    )
    return min(seconds) / counts[0] / BATCH_SIZE


def timed(function):
    """Result of a call, and its CPU seconds in all threads."""
    start = time.process_time()
    return function(), time.process_time() - start


def first_step(folder: str) -> dict:
    """CPU seconds and peak memory of scripts/train.py up to the metrics of its first step."""
    from flax_resnet.commands import main
    from flax_resnet.devices.parallel import Engine

    fetch_metrics = Engine.fetch_metrics

    def fetch(engine, metrics):
        fetch_metrics(engine, metrics)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        used = {"cpu_seconds_to_first_step": time.process_time(), "peak_mib_at_first_step": peak}
        print("\n" + json.dumps(used, allow_nan=False), flush=True)
        os._exit(0)

    with tempfile.TemporaryDirectory() as run, mock.patch.object(Engine, "fetch_metrics", fetch):
        flags = ["--arch", "basic_cnn", "--dataset", f"folder:{folder}", "--cache", "none"]
        sys.argv = ["scripts/train.py", *flags, "--log-steps", "1", "--run-dir", f"{run}/run"]
        main.run("train")


PARTS = {"costs": costs, "first_step": first_step}


if __name__ == "__main__":
    exits.run_command(main)
