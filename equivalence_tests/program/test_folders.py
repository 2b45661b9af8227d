"""Folders of images: which split is what, links, hidden files, images that are broken."""

import pickle
import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image

from equivalence_tests.program.image_folder import fill, picture, refused
from flax_resnet.config import DataConfig
from flax_resnet.data.sources import FolderSource, Subset, open_dataset


@pytest.fixture
def tree(tmp_path):
    """Three splits of the classes ant, bee and Cow."""
    root = tmp_path / "set"
    for split, number in (("train", 10), ("val", 4), ("test", 5)):
        for name in ("bee", "ant", "Cow"):
            fill(root / split / name, number)
    return root


def test_folder_with_three_splits(tree):
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert opened.class_names == ("Cow", "ant", "bee") and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [30, 12, 15]
    reference = torchvision.datasets.ImageFolder(tree / "train")
    assert opened.train.names == tuple(path for path, _ in reference.samples)
    assert opened.train.labels.dtype == np.int32
    np.testing.assert_array_equal(opened.train.labels, reference.targets)
    for index in (0, 11, 29):
        np.testing.assert_array_equal(opened.train[index], np.asarray(reference[index][0]))


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folder_with_one_held_out_split_tests_on_it(tree, held_out):
    (tree / "val").rename(tree / "other")
    shutil.rmtree(tree / "test")
    (tree / "other").rename(tree / held_out)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", validation_fraction=0.2))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [24, 6, 12]
    assert all(f"/{held_out}/" in name for name in opened.test.names)


def test_folder_of_classes_is_split_both_ways(tree):
    config = DataConfig(dataset=f"folder:{tree}/train", test_fraction=0.3, validation_fraction=0.2)
    opened = open_dataset(config)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [16, 5, 9]
    assert np.bincount(opened.test.labels).tolist() == [3, 3, 3]
    names = [name for s in (opened.train, opened.validation, opened.test) for name in s.names]
    assert len(set(names)) == 30


def test_folder_grayscale_is_torchvisions(tree):
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", grayscale=True))
    reference = torchvision.transforms.Grayscale()(Image.open(opened.train.names[3]))
    assert opened.channels == 1
    np.testing.assert_array_equal(opened.train[3][..., 0], np.asarray(reference))


def test_folder_hidden_ignored_and_nested(tree):
    (tree / ".cache").mkdir()
    (tree / "train" / ".hidden").mkdir()
    picture().save(tree / "train/ant/.thumb.png")
    (tree / "train/ant/notes.txt").write_text("no image")
    (tree / "train/ant/more").mkdir()
    picture().save(tree / "train/ant/more/UPPER.JPEG")
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert len(opened.train) == 31 and opened.ignored_files == 1


def test_folder_refusals(tree, tmp_path):
    refused(f"folder:{tmp_path}/nowhere", "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(f"folder:{tmp_path}/empty", "empty", "no class folder")
    fill(tmp_path / "one" / "ant")
    refused(f"folder:{tmp_path}/one", "ant", "only")
    (tree / "valid").mkdir()
    refused(f"folder:{tree}", "valid", "train")
    (tree / "valid").rename(tree / "validation")
    refused(f"folder:{tree}", "validation", "val")
    (tree / "validation").rmdir()
    (tree / "train/ant").rename(tree / "train/wasp")
    refused(f"folder:{tree}", "missing wasp", "extra ant")


def test_folder_of_a_class_that_no_file_can_name(tree):
    for split in ("train", "val", "test"):
        (tree / split / "ant").rename(tree / split / "caf\udce9")
    refused(f"folder:{tree}", "caf\\udce9", "UTF-8")


def test_folder_without_training_split(tree):
    (tree / "train").rename(tree.parent / "elsewhere")
    refused(f"folder:{tree}", "must have train", "test, val")


def test_folder_class_without_image(tree):
    for path in (tree / "val/bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(f"folder:{tree}", "no image", "bee", "validation")


@pytest.mark.parametrize("link", ["train/ant/link.png", "train/ant/sub", "train/wasp", "test/ant"])
def test_folder_link_out_is_refused(tree, tmp_path, link):
    fill(tmp_path / "outside")
    target = tmp_path / "outside" / ("00.png" if link.endswith("png") else "")
    path = tree / link
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(target)
    refused(f"folder:{tree}", path, "symbolic link")


def test_folder_link_inside_is_followed_and_a_loop_refused(tree):
    (tree / "train/ant/link.png").symlink_to(tree / "train/bee/00.png")
    assert len(open_dataset(DataConfig(dataset=f"folder:{tree}")).train) == 31
    (tree / "train/ant/loop").symlink_to(tree / "train/ant")
    refused(f"folder:{tree}", "loop", "symbolic link")


def break_some(tree):
    bad = [tree / "train/ant/03.png", tree / "test/bee/01.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in bad]


def test_bad_images_are_skipped(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", on_bad_image="skip"))
    assert [path for path, _ in opened.bad_images] == bad
    assert all(reason.startswith("not a readable image (") for _, reason in opened.bad_images)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [29, 12, 14]
    assert not set(bad) & {*opened.train.names, *opened.test.names}
    assert [opened.train[index].shape[2] for index in range(29)] == [3] * 29


def test_bad_images_are_errors_when_met(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert len(opened.train) == 30 and opened.bad_images == ()
    refused(f"folder:{tree}", bad[0])


def test_class_of_bad_images_only(tree):
    for path in (tree / "val/bee").iterdir():
        path.write_bytes(b"")
    refused(f"folder:{tree}", "bee", "none of 4", on_bad_image="skip")


def test_sources_cross_process_borders(tree):
    source = Subset(open_dataset(DataConfig(dataset=f"folder:{tree}")).train, np.array([4, 2]))
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy.source, FolderSource) and copy.names == source.names
    np.testing.assert_array_equal(copy[1], source[np.int64(1)])
