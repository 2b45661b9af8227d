"""Times the decoding of JPEGs for training: this project, Pillow, torchvision.io, timm's loader.

python -m equivalence_tests.benchmark.decoding --cores 2  # 3 minutes; writes results/decoding.json

Each way reads files of about the size of ImageNet's, decodes them and resizes a random part of each
to 224 pixels. The two libraries alone run in one thread on one core. The loaders have as many
worker processes as cores, and their images per second are divided by the cores.
"""

import argparse
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageDataset, create_loader
from torchvision import io
from torchvision.transforms import v2

from equivalence_tests import results
from flax_resnet.config import DataConfig
from flax_resnet.data import pipeline, shards
from flax_resnet.data.sources import open_dataset

SIZE, BATCH_SIZE = 224, 32
WARM_UP = 24
"""Batches for each core before the clock starts; a loader reads fewer ahead for a worker."""

REPEATS = 3
FILES, PICTURES = 4_000, 64
"""Files, which are links to so many pictures."""

ASSUMED_H100 = 3_000
"""Images per second that one H100 would take in the training of a ResNet-50. No GPU was measured:
this is an assumption."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        mean_bytes = write_files(Path(name, "files"))
        write_shards(Path(name, "files"), Path(name, "shards"))
        rows = {way.__name__: row(way, Path(name), args) for way in WAYS}
    document = {"ways": rows, "mean_bytes_of_a_file": mean_bytes, "batch_size": BATCH_SIZE}
    ours, bare = (rows[way]["images_per_second_a_core"] for way in ("worker_processes", "pillow"))
    document |= {"worker_processes_to_pillow": ours / bare, "assumed_h100": ASSUMED_H100}
    document |= {"cores_for_the_assumed_h100": math.ceil(ASSUMED_H100 / ours)}
    results.write("decoding", document)
    print(document)


def row(way: Callable, folder: Path, args) -> dict:
    """Images per second and core of a way: the median of the repetitions, and all of them."""
    available = os.sched_getaffinity(0)
    cores = 1 if way in ALONE else args.cores
    os.sched_setaffinity(0, sorted(available)[:cores])
    try:
        rates = [rate(way(folder, cores), WARM_UP * cores, args.batches) for _ in range(REPEATS)]
        rates = [images / cores for images in rates]
    finally:
        os.sched_setaffinity(0, available)
    return {"cores": cores, "images_per_second_a_core": statistics.median(rates), "all": rates}


def rate(batches: Iterator, warm_up: int, count: int, clock=time.perf_counter) -> float:
    """Images per second of `count` batches, after `warm_up` others."""
    for _ in itertools.islice(batches, warm_up):
        pass
    start = clock()
    seen = sum(1 for _ in itertools.islice(batches, count))
    assert seen == count, "the files do not suffice for so many batches"
    return seen * BATCH_SIZE / (clock() - start)


def write_files(folder: Path) -> float:
    """Write parts of photographs, 500 x 375 pixels, in two classes; the mean size in bytes."""
    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    for number in range(PICTURES):
        image = photographs[number % 2]
        top, left = (
            rng.integers(s - part + 1) for s, part in zip(image.shape, (375, 500), strict=False)
        )
        first = folder / "ab"[number % 2] / f"{number:05}.jpg"
        first.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[top : top + 375, left : left + 500]).save(first, quality=95)
        for copy in range(number + PICTURES, FILES, PICTURES):
            os.link(first, first.with_name(f"{copy:05}.jpg"))
    return statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))


def write_shards(files: Path, folder: Path):
    folder.mkdir()
    source = open_folder(f"folder:{files}")
    contents = (Path(source.file(index)).read_bytes() for index in range(len(source)))
    splits = {"train": (contents, source.labels)}
    for _ in shards.write(folder, splits, 1000, class_names="ab", channels=3):
        pass


def open_folder(dataset: str):
    fields = {"validation_fraction": 0.0, "test_fraction": 0.0}
    return open_dataset(DataConfig(dataset=dataset, **fields)).train


def in_batches(decode: Callable, folder: Path) -> Iterator:
    files = itertools.cycle(sorted(map(str, Path(folder, "files").rglob("*.jpg"))))
    while True:
        yield np.stack([np.asarray(decode(path)) for path in itertools.islice(files, BATCH_SIZE)])


def pillow(folder: Path, cores: int) -> Iterator:
    crop = v2.RandomResizedCrop(SIZE)
    return in_batches(lambda path: crop(Image.open(path).convert("RGB")), folder)


def torchvision_io(folder: Path, cores: int) -> Iterator:
    crop = v2.RandomResizedCrop(SIZE)
    return in_batches(lambda path: crop(io.decode_jpeg(io.read_file(path))), folder)


def timm_loader(folder: Path, cores: int) -> Iterator:
    loader = create_loader(
        ImageDataset(str(folder / "files")),
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH_SIZE,
        is_training=True,
        hflip=0.0,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=cores,
        device=torch.device("cpu"),
    )
    return iter(loader.loader)  # uint8, before the normalisation on the device


def of_this_project(dataset: str, num_workers: int) -> Iterator:
    source = open_folder(dataset)
    decoder = pipeline.Decoder(size=SIZE, resize=SIZE, random_resized_crop=True)
    order = pipeline.BatchOrder(num_images=len(source), batch_size=BATCH_SIZE, seed=0, epochs=1000)
    return pipeline.image_iterator(source, decoder, order, num_workers=num_workers)


def worker_processes(folder: Path, cores: int) -> Iterator:
    return of_this_project(f"folder:{folder}/files", cores)


def worker_processes_and_shards(folder: Path, cores: int) -> Iterator:
    return of_this_project(f"arrayrecord:{folder}/shards", cores)


def threads(folder: Path, cores: int) -> Iterator:
    return of_this_project(f"folder:{folder}/files", 0)


ALONE = (pillow, torchvision_io)
WAYS = (*ALONE, timm_loader, worker_processes, worker_processes_and_shards, threads)


if __name__ == "__main__":
    main()
