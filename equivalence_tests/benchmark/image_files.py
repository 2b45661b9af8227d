"""Times `flax-resnet predict` on image files beside its parts: the network, and the decoding.

    python -m equivalence_tests.benchmark.image_files runs/birds photos/  # results/image-files.json

The command runs as a process of its own, on all files and on one batch of them, so that the
difference leaves out the start. The network alone takes arrays in memory, and the decoding alone
keeps none of its images. The three take turns.
"""

import argparse
import collections
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from equivalence_tests import results
from flax_resnet.commands import predict
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.shared import Names
from flax_resnet.data.sources import FolderSource
from flax_resnet.interop.loaded_run import LoadedRun, load_run

ROUNDS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    run = load_run(args.run)
    paths, _ = predict.image_files([args.folder])
    rounds = [one_round(run, args, paths) for _ in range(ROUNDS)]
    speeds = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    facts = {"arch": run.config.model.arch, "image_shape": run.image_shape, "files": len(paths)}
    facts |= {"mean_bytes_of_a_file": statistics.mean(path.stat().st_size for path in paths)}
    results.write("image-files", facts | {"images_per_second": speeds, "rounds": rounds})
    print(speeds)


def one_round(run: LoadedRun, args, paths: list[Path]) -> dict[str, float]:
    """Images per second of the command without its start, of the decoding and of the network."""
    size = run.config.eval_batch_size
    seconds = of_process(args.run, args.folder) - of_process(args.run, *paths[:size])
    names = Names.of(map(str, paths))
    source = FolderSource(names, np.zeros(len(paths)), run.channels)
    decode = functools.partial(pipeline.decoded, source, evaluation_decoder(run.config.data))
    parts = [range(len(paths))[start : start + size] for start in range(0, len(paths), size)]
    batch = np.zeros((size, *run.image_shape), np.uint8)
    run.predict(batch)  # compiles
    return {
        "command": (len(paths) - size) / seconds,
        "decoding": len(paths) / timed(pipeline.ahead(decode, parts)),
        "network": size * len(parts) / timed(run.predict(batch) for _ in parts),
    }


def timed(batches: Iterator) -> float:
    """Seconds to go through an iterator."""
    started = time.perf_counter()
    collections.deque(batches, maxlen=0)
    return time.perf_counter() - started


def of_process(run_dir: Path, *images: Path) -> float:
    """Seconds of the command as a process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "predictions.json"
        command = [sys.executable, "scripts/predict.py", run_dir, *images, "--json", target]
        started = time.perf_counter()
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
