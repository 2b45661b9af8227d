"""The twin reads folders as flax_resnet does: the same files in the same order, the same pixels,
and what the one refuses the other refuses."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from equivalence_tests.program.image_folder import encoded, fill, picture, upright
from equivalence_tests.program.test_image_files import AS_SHOWN, BROKEN, NOT_SAID
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.image_files import read_image
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError
from torch_ref import image_files, sources
from torch_ref.prepare import prepare

SPLITS = ("train", "val", "test")
COLOURS = {1: v2.Grayscale(), 3: v2.RGB()}


@pytest.fixture
def tree(tmp_path):
    """Three splits of ant and bee, each with folders inside the folders of a class."""
    root = tmp_path / "set"
    for split in SPLITS:
        for name in ("bee", "ant"):
            fill(root / split / name, 6)
            fill(root / split / name / "03", 2)
            fill(root / split / name / "03.d" / "more", 2, ".JPG")
    return root


@pytest.mark.parametrize("place", [".", "train"])
def test_the_same_files_in_the_same_order(tree, place):
    """The folder holds splits, or class folders that are split."""
    assert_same_files(f"folder:{tree / place}")


def assert_same_files(dataset: str) -> tuple[str, ...]:
    """Asserts the same files on both sides, in all splits; returns the names of the classes."""
    config = DataConfig(dataset=dataset)
    ours, twin = open_dataset(config), sources.open_dataset(config)
    assert ours.class_names == twin.class_names
    for name in ("train", "validation", "test"):
        split = getattr(ours, name)
        assert list(twin.splits[name].items) == list(split.names)
        np.testing.assert_array_equal(twin.splits[name].labels, split.labels)
    return twin.class_names


def test_names_that_are_no_text(tree):
    (tree / "train/ant/00.png").rename(tree / "train/ant/a\udcff.png")
    assert_same_files(f"folder:{tree}")
    data = DataConfig(dataset=f"folder:{tree}")
    assert len(sources.open_dataset(data).contents()) == 4


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere.png")])
def test_what_is_no_file_is_refused(tree, make):
    make(tree / "train/ant/pipe.png")
    with pytest.raises(InputError, match="pipe.png is no image: no regular file"):
        sources.open_dataset(DataConfig(dataset=f"folder:{tree}"))


def test_the_same_files_under_other_names(tree):
    """Splits, classes and suffixes; a class that is empty; thumbnails."""
    (tree / "wrapped").mkdir()
    for split, name in (("train", "Training"), ("val", "VALID"), ("test", "Testing")):
        (tree / split / "ant").rename(tree / split / ("é" if split == "val" else "e\u0301"))
        (tree / split).rename(tree / "wrapped" / name)
    shutil.rmtree(tree / "wrapped/VALID/bee")
    (tree / "wrapped/VALID/bee").mkdir()
    fill(tree / "wrapped/Training/bee/@eaDir", 2)
    picture().save(tree / "wrapped/Training/bee/0.jfif", format="JPEG")
    assert assert_same_files(f"folder:{tree}") == ("bee", "é")


@pytest.mark.parametrize("exif_transpose", [False, True])
def test_the_same_turned_images(tree, exif_transpose):
    picture(size=(8, 12)).save(tree / "train/ant/turned.jpg", exif=upright(6))
    config = DataConfig(dataset=f"folder:{tree}", exif_transpose=exif_transpose)
    ours, twin = open_dataset(config).train, sources.open_dataset(config).splits["train"]
    [index] = [n for n, name in enumerate(ours.names) if name.endswith("turned.jpg")]
    np.testing.assert_array_equal(ours[index], np.asarray(twin.image(index)))


def remove_from_every_split(root, name):
    for split in SPLITS:
        shutil.rmtree(root / split / name)


def without_images(folder):
    for path in filter(Path.is_file, list(folder.rglob("*"))):
        path.rename(path.with_suffix(".txt"))


def parts(root, *names):
    for split in SPLITS:
        shutil.rmtree(root / split)
    for name in names:
        fill(root / name)


def link(path, target):
    fill(path.parents[3] / "outside", 1)
    path.symlink_to(target)


SPOIL = {
    "no folder": lambda root: shutil.rmtree(root),
    "no class folder": lambda root: [remove_from_every_split(root, n) for n in ("ant", "bee")],
    "one class": lambda root: remove_from_every_split(root, "bee"),
    "an empty class": lambda root: (root / "train/wasp").mkdir(),
    "a class without images": lambda root: without_images(root / "train/ant"),
    "a split without images": lambda root: without_images(root / "val"),
    "folds": lambda root: [(root / n).rename(root / f"fold{i}") for i, n in enumerate(SPLITS)],
    "parts": lambda root: [(root / n).rename(root / f"{n}_set") for n in SPLITS],
    "parts of images": lambda root: parts(root, "trainimages", "testimages"),
    "parts by letter": lambda root: parts(root, "trainA", "trainB", "testA", "testB"),
    "two names alike": lambda root: [fill(root / "val" / n) for n in ("café", "cafe\u0301")],
    "a class that is missing": lambda root: shutil.rmtree(root / "test/bee"),
    "a class too many": lambda root: fill(root / "test/wasp"),
    "val and validation": lambda root: shutil.copytree(root / "val", root / "validation"),
    "an unknown split": lambda root: (root / "other").mkdir(),
    "no training split": lambda root: shutil.rmtree(root / "train"),
    "a link out": lambda root: link(root / "train/ant/06.png", root.parent / "outside/00.png"),
    "a link to itself": lambda root: link(root / "train/ant/self.png", "self.png"),
    "a loop of links": lambda root: link(root / "train/ant/loop", root / "train/ant"),
}


@pytest.mark.parametrize("fault", SPOIL)
def test_the_same_folders_are_refused(tree, fault):
    SPOIL[fault](tree)
    config = DataConfig(dataset=f"folder:{tree}")
    with pytest.raises(InputError):
        open_dataset(config)
    with pytest.raises(InputError, match=str(tree)) as error:
        sources.open_dataset(config)
    assert "\n" not in str(error.value)


LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
READABLE = {
    "16 bits.png": Image.fromarray(LEVELS),
    "16 bits.tif": Image.fromarray(LEVELS),
    "16 bits, high byte first.tif": Image.fromarray(LEVELS.astype(">u2")),
    "32 bits.tif": Image.fromarray(LEVELS.astype(np.int32)),
    **{f"{mode}.tif": picture(mode=mode) for mode in ("1", "L", "LA", "CMYK", "YCbCr", "LAB")},
    **{f"{mode}.png": picture(mode=mode) for mode in ("1", "LA", "P", "RGBA")},
    "CMYK.jpg": picture(mode="CMYK"),
}


@pytest.mark.parametrize("kind", AS_SHOWN)
def test_the_same_gray(tmp_path, kind):
    (tmp_path / kind).write_bytes(AS_SHOWN[kind])
    twin = np.asarray(image_files.read_image(tmp_path / kind))
    np.testing.assert_array_equal(read_image(tmp_path / kind, 3), twin)


@pytest.mark.parametrize("kind", NOT_SAID)
def test_the_same_depths_are_refused(tmp_path, kind):
    (tmp_path / kind).write_bytes(NOT_SAID[kind])
    with pytest.raises(InputError, match=kind):
        image_files.read_image(tmp_path / kind)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", READABLE)
def test_the_same_pixels(tmp_path, name, channels):
    READABLE[name].save(tmp_path / name)
    twin = np.asarray(COLOURS[channels](image_files.read_image(tmp_path / name)))
    np.testing.assert_array_equal(
        read_image(tmp_path / name, channels), twin.reshape(*twin.shape[:2], channels)
    )


UNREADABLE = BROKEN | {
    "float.tif": encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), format="TIFF"),
    "deep.tif": encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), format="TIFF"),
    "negative.tif": encoded(Image.fromarray(np.full((4, 4), -1, np.int32)), format="TIFF"),
    "script.png": encoded(picture(), format="EPS"),
    "large.png": encoded(picture(size=(40, 40)), format="PNG"),
    "enormous.png": encoded(picture(size=(64, 64)), format="PNG"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_same_files_are_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # Pillow warns, and refuses 3000
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(InputError):
        read_image(path, 3)
    with pytest.raises(InputError, match=name) as error:
        image_files.read_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [OverflowError("much"), SyntaxError("odd"), KeyError()])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    picture().save(tmp_path / "odd.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(InputError, match="odd.png is no image: ."):
        image_files.read_image(tmp_path / "odd.png")


@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5)])
def test_one_mean_and_deviation_a_channel(tree, values):
    for mean, std in ((values, (0.5, 0.5, 0.5)), ((0.5, 0.5, 0.5), values)):
        data = DataConfig(dataset=f"folder:{tree}", mean=mean, std=std)
        with pytest.raises(InputError, match=f"has {len(values)} values, the images 3 channels"):
            prepare(TrainConfig(batch_size=1, data=data))


def test_a_home_directory(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    found = sources.open_dataset(DataConfig(dataset="folder:~/set"))
    assert found.class_names == ("ant", "bee") and len(found.splits["train"]) == 20
