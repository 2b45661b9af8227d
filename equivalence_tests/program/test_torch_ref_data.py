"""The twin's data: splits, limits and folders are those of flax_resnet."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from equivalence_tests.program.twin import open_twin, small
from flax_resnet.config import DataConfig
from flax_resnet.data import sources
from flax_resnet.data.image_files import SUFFIXES
from torch_ref import (
    prepare,
)
from torch_ref import sources as torch_sources


def test_splits_are_stratified_disjoint_and_repeatable():
    digits = prepare.prepare(small(data={"train_images": None, "eval_images": None})).dataset
    sizes = {name: len(split) for name, split in digits.splits.items()}
    assert sizes == {"train": 1293, "validation": 144, "test": 360}
    counts = np.bincount(digits.splits["test"].labels)
    assert counts.min() >= 34 and counts.max() <= 38
    again = open_twin()
    np.testing.assert_array_equal(digits.splits["test"].items, again.splits["test"].items)
    image, label = digits.splits["train"][0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and isinstance(label, int)
    stacked = torch.stack([image for image, _ in digits.splits["train"]])
    assert stacked.mean().abs() < 1e-5 and abs(stacked.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize("count", [100, 5, 1293 - 3])
def test_both_frameworks_use_the_same_images(count):
    """Held out and limited alike: also where the count is not enough for every class."""
    fields = DataConfig(train_images=count, eval_images=100)
    theirs, ours = torch_sources.open_dataset(fields).splits, sources.open_dataset(fields)
    assert len(ours.train) == count and len(ours.test) == 100
    for name in ("train", "validation", "test"):
        split = getattr(ours, name)
        np.testing.assert_array_equal(theirs[name].labels, split.labels)
        images = np.stack([split[i] for i in range(len(split))])
        np.testing.assert_array_equal(theirs[name].items, images[..., 0])


def write_folder(root, splits, mode="RGB"):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i}.png")
    return f"folder:{root}"


def test_limits_are_upper_limits():
    limited = open_twin(train_images=100, eval_images=90).splits
    assert {name: len(split) for name, split in limited.items()} == {
        "train": 100, "validation": 90, "test": 90,
    }  # fmt: skip
    assert len(open_twin(eval_images=10**6).splits["test"]) == len(open_twin().splits["test"])


@pytest.mark.parametrize(
    "found, sizes",
    [
        (("train", "val", "test"), {"train": 10, "validation": 10, "test": 10}),
        (("train", "test"), {"train": 8, "validation": 2, "test": 10}),
        (("train", "val"), {"train": 8, "validation": 2, "test": 10}),
    ],
)
def test_folders(tmp_path, found, sizes):
    name = write_folder(tmp_path, found)
    fields = dict(dataset=name, image_size=16, validation_fraction=0.2)
    images = prepare.prepare(small(batch_size=1, data=fields)).dataset
    assert {split: len(value) for split, value in images.splits.items()} == sizes
    assert images.class_names == ("cat", "dog") and images.channels == 3
    assert images.splits["train"][0][0].shape == (3, 16, 16)


def test_both_sides_find_the_same_images(tmp_path):
    """The two sides find files of every suffix, and nothing that is hidden."""
    name = write_folder(tmp_path, ["train", "test"])
    train, image = tmp_path / "train", Image.new("RGB", (8, 8))
    for number, suffix in enumerate(sorted({*IMG_EXTENSIONS, *SUFFIXES})):
        image.convert("L" if suffix == ".pgm" else "RGB").save(train / "cat" / f"{number}{suffix}")
    (train / "cat" / "notes.txt").write_text("meow")
    (train / "cat" / "._0.png").write_bytes(b"hidden")
    for hidden in (train / ".ipynb_checkpoints", train / "dog" / ".thumbnails"):
        hidden.mkdir()
        image.save(hidden / "0.png")
    fields = dict(dataset=name, validation_fraction=0)
    theirs, other = open_twin(**fields), sources.open_dataset(DataConfig(**fields))
    assert other.class_names == theirs.class_names == ("cat", "dog")
    twin, ours = theirs.splits["train"], other.train
    assert dict(zip(twin.items, twin.labels, strict=True)) == dict(
        zip(map(str, ours.names), ours.labels, strict=True)
    )


@pytest.mark.parametrize("grayscale, channels", [(False, 3), (True, 1)])
def test_a_folder_of_gray_images_has_the_channels_of_the_other_side(tmp_path, grayscale, channels):
    name = write_folder(tmp_path, ["train"], "L")
    fields = dict(dataset=name, validation_fraction=0.3, grayscale=grayscale)
    images = prepare.prepare(small(batch_size=1, data=fields))
    assert images.dataset.channels == channels and images.config.data.image_size == 224
    assert sources.open_dataset(DataConfig(**fields)).channels == channels
