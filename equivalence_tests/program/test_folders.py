"""Image folders: splits, links, hidden files, broken images."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torchvision
from PIL import Image

from equivalence_tests.program.image_folder import fill, picture, refused, upright
from flax_resnet.config import DataConfig
from flax_resnet.data.pipeline import Decoder, decode_all
from flax_resnet.data.shared import Names
from flax_resnet.data.sources import FolderSource, Subset, open_dataset
from flax_resnet.errors import InputError


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
    assert len(opened.train) == 31 and opened.passed_over[".txt"] == 1


def test_bad_folders_are_refused_by_name(tree, tmp_path):
    refused(f"folder:{tmp_path}/nowhere", "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(f"folder:{tmp_path}/empty", "empty", "no class folder")
    fill(tmp_path / "one" / "ant")
    refused(f"folder:{tmp_path}/one", "ant", "only")
    (tree / "other").mkdir()
    refused(f"folder:{tree}", "other", "train")
    (tree / "other").rmdir()
    (tree / "train/ant").rename(tree / "train/wasp")
    refused(f"folder:{tree}", "missing wasp", "extra ant")


def test_folder_of_a_class_that_no_file_can_name(tree):
    for split in ("train", "val", "test"):
        (tree / split / "ant").rename(tree / split / "caf\udce9")
    refused(f"folder:{tree}", "caf\\udce9", "UTF-8")


def test_folder_without_training_split(tree):
    (tree / "train").rename(tree.parent / "elsewhere")
    refused(f"folder:{tree}", "must have train", "test, val")


@pytest.mark.parametrize("names", [
    ("TRAIN", "VAL", "TEST"), ("Training", "Valid", "Testing"), ("train", "valid", "test"),
    ("training", "Validation", "Test"), ("train", "dev", "test"),
])  # fmt: skip
@pytest.mark.parametrize("wrapper", ["", "birds"])
def test_splits_have_many_names(tree, names, wrapper):
    """Names may be in upper or lower case, and splits one folder deeper."""
    (tree / wrapper).mkdir(exist_ok=True)
    for before, now in zip(("train", "val", "test"), names, strict=True):
        (tree / before).rename(tree / wrapper / now)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert opened.class_names == ("Cow", "ant", "bee")
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [30, 12, 15]


@pytest.mark.parametrize("other", ["Train", "training", "TRAINING"])
def test_two_folders_of_one_split_are_refused(tree, other):
    fill(tree / other / "ant")
    refused(f"folder:{tree}", f"{other}", "train", "the same split")


@pytest.mark.parametrize("names", [
    ("fold0", "fold1"), ("split_1", "split_2"), ("train_set", "test_set"), ("TrainSet", "TestSet"),
    ("seg_train", "seg_test"), ("trainA", "trainB", "testA", "testB"),
    ("TrainImages", "TestImages"), ("a", "b"), ("2019", "2020"),
])  # fmt: skip
def test_folders_that_look_like_splits_are_no_classes(tmp_path, names):
    for name in names:
        for class_name in ("ant", "bee"):
            fill(tmp_path / "set" / name / class_name, 4)
    refused(f"folder:{tmp_path}/set", *names, "not like classes")


def test_folds_inside_a_split_are_no_classes(tmp_path):
    for name in ("train/fold0/ant", "train/fold1/ant"):
        fill(tmp_path / "set" / name, 4)
    refused(f"folder:{tmp_path}/set", "fold0", "fold1", "ant", "not like classes")


def test_folds_without_classes_are_no_classes(tmp_path):
    for name in ("fold0", "fold1"):
        fill(tmp_path / "set" / name, 4)
    refused(f"folder:{tmp_path}/set", "fold0", "fold1", "not like classes")


def test_classes_may_have_their_images_in_deeper_folders(tmp_path):
    for name in ("ant/red", "bee/honey"):
        fill(tmp_path / "set" / name)
    opened = open_dataset(DataConfig(dataset=f"folder:{tmp_path}/set"))
    assert opened.class_names == ("ant", "bee")


def test_a_class_may_be_empty_where_nothing_is_learned(tree):
    for path in (tree / "val/bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert np.bincount(opened.validation.labels, minlength=3).tolist() == [4, 4, 0]
    assert opened.validation.labels.dtype == np.int32
    shutil.rmtree(tree / "val/bee")
    refused(f"folder:{tree}", "missing bee", "may be empty")


def test_a_class_without_training_images_says_what_to_do(tree):
    shutil.rmtree(tree / "train/bee")
    (tree / "train/bee").mkdir()
    refused(f"folder:{tree}", "no image", "bee", "from every split")
    for split in ("train", "val", "test"):
        shutil.rmtree(tree / split / "bee")
    assert open_dataset(DataConfig(dataset=f"folder:{tree}")).class_names == ("Cow", "ant")


def test_a_split_without_images_is_refused(tree):
    for path in (tree / "val").rglob("*.png"):
        path.unlink()
    refused(f"folder:{tree}", "no image in any class of validation")


def test_names_are_compared_in_one_form_of_unicode(tree):
    """macOS stores an accent as a separate character."""
    for split, name in (("train", "café"), ("val", "cafe\u0301"), ("test", "café")):
        (tree / split / "Cow").rename(tree / split / name)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert opened.class_names == ("ant", "bee", "café") and len(opened.validation) == 12
    fill(tree / "val" / "café")
    refused(f"folder:{tree}", "look alike", "caf\\xe9")


def test_thumbnails_of_systems_are_passed_over_and_counted(tree):
    for name in ("train/@eaDir", "train/ant/@eaDir", "__MACOSX", "train/ant/.thumbnails"):
        fill(tree / name, 1)
    (tree / "train/ant/notes.txt").write_text("no image")
    picture().save(tree / "train/ant/other.jfif", format="JPEG")
    picture().save(tree / "train/of-no-class.png")
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert opened.class_names == ("Cow", "ant", "bee") and len(opened.train) == 31
    assert list(opened.remarks()) == [
        "passed over: 1 file(s) not named as images: 1 .txt",
        "passed over: 4 hidden or system folder(s)",
        "passed over: 1 image(s) outside of the class folders",
    ]


def test_turned_images_are_counted_where_they_stay_turned(tree):
    for number in range(3):
        exif = upright(6)
        picture(size=(8, 12)).save(tree / f"train/ant/turned{number}.jpg", exif=exif)
    config = DataConfig(dataset=f"folder:{tree}")
    opened = open_dataset(config)
    [line] = opened.remarks()
    assert line.startswith("3 of 33 images carry an EXIF rotation that is not applied; --exif")
    assert line.endswith("(train split)")
    index = list(opened.train.names).index(str(tree / "train/ant/turned0.jpg"))
    assert opened.train[index].shape == (8, 12, 3)
    opened = open_dataset(dataclasses.replace(config, exif_transpose=True))
    assert not list(opened.remarks()) and opened.train[index].shape == (12, 8, 3)


@pytest.mark.parametrize("split, number", [("val", 13), ("test", 16)])
def test_turned_images_of_each_split_are_counted(tree, split, number):
    picture(size=(8, 12)).save(tree / split / "ant/turned.jpg", exif=upright(6))
    [line] = open_dataset(DataConfig(dataset=f"folder:{tree}")).remarks("so it is")
    name = {"val": "validation"}.get(split, split)
    counts = f"1 of {number} images carry an EXIF rotation that is not applied"
    assert line == f"{counts}; so it is ({name} split)"


def test_turned_images_of_a_part_that_was_cut_are_counted_there(tree):
    for path in (tree / "train").rglob("*.png"):
        picture(size=(8, 12)).save(path.with_suffix(".jpg"), exif=upright(6))
        path.unlink()
    lines = list(open_dataset(DataConfig(dataset=f"folder:{tree}/train")).remarks())
    assert [line.rpartition("(")[2] for line in lines] == [
        "train split)", "validation split)", "test split)",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines] == ["21", "3", "6"]


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


@pytest.mark.parametrize("name", ["self.png", "train/self", "train/ant/self.png"])
def test_a_link_to_itself_is_refused(tree, name):
    (tree / name).symlink_to((tree / name).name)
    refused(f"folder:{tree}", tree / name, "symbolic link to itself")


def break_some(tree):
    bad = [tree / "train/ant/03.png", tree / "test/bee/01.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in bad]


def test_bad_images_are_skipped(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", on_bad_image="skip"))
    assert [path for path, _ in opened.bad_images] == bad
    assert [line.split(" (")[0] for line in opened.remarks()] == [f"left out: {b}" for b in bad]
    assert all(reason.startswith("not a readable image (") for _, reason in opened.bad_images)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [29, 12, 14]
    assert not set(bad) & {*opened.train.names, *opened.test.names}
    assert [opened.train[index].shape[2] for index in range(29)] == [3] * 29


def test_bad_images_are_errors_when_met(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert len(opened.train) == 30 and opened.bad_images == ()
    refused(f"folder:{tree}", bad[0])


def test_all_bad_images_are_named_at_once(tree):
    for number in range(7):
        (tree / f"train/ant/{number:02}.png").write_bytes(b"")
    source = open_dataset(DataConfig(dataset=f"folder:{tree}")).train
    with pytest.raises(InputError) as error:
        decode_all(source, Decoder(size=8, resize=8))
    message = str(error.value)
    assert message.startswith("7 images cannot be read: ") and "ant/04.png" in message
    assert message.endswith("and 2 more; `on_bad_image` skip leaves such files out")


def test_a_class_of_bad_images_only_is_refused(tree):
    for path in (tree / "val/bee").iterdir():
        path.write_bytes(b"")
    refused(f"folder:{tree}", "bee", "none of 4", on_bad_image="skip")


def test_sources_cross_process_borders(tree):
    source = Subset(open_dataset(DataConfig(dataset=f"folder:{tree}")).train, np.array([4, 2]))
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy.source, FolderSource) and copy.names == source.names
    np.testing.assert_array_equal(copy[1], source[np.int64(1)])


def test_a_pickle_of_a_large_source_says_where_it_lies():
    """Workers map names, labels and indices of a million files instead of copying them."""
    names = Names.of(f"/data/class{number % 9}/é{number}.jpg" for number in range(50_000))
    source = FolderSource(names, np.arange(50_000, dtype=np.int32), 3)
    subset = Subset(source, np.arange(50_000)[::-1])
    first = subset.labels  # computed before it is sent
    content = pickle.dumps(subset)
    assert len(content) < 2000
    copy = pickle.loads(content)
    assert copy.names == subset.names and copy.names[0] == "/data/class4/é49999.jpg"
    np.testing.assert_array_equal(copy.labels, first)
    assert isinstance(copy.source.names.text, np.memmap)
