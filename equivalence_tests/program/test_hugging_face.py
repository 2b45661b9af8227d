"""Data sets that the library `datasets` reads."""

import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.command import run_script
from equivalence_tests.program.image_folder import encoded, picture, refused
from flax_resnet.config import DataConfig
from flax_resnet.data.image_files import BadImage
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError

MODES = ("RGB", "L", "RGBA")
NAMES = ("cat", "dog")


@pytest.fixture
def written(tmp_path):
    """Writes a set with images per split; columns have the given names."""
    datasets = pytest.importorskip("datasets")

    def write(splits, image="image", label="label", unlabelled=(), more=None, names=NAMES):
        """`unlabelled` holds splits and (split, row) pairs."""
        features = {image: datasets.Image(), label: datasets.ClassLabel(names=list(names))}
        rows = {
            split: [
                {
                    image: {"bytes": content(index), "path": None},
                    label: -1 if {split, (split, index)} & set(unlabelled) else index % 2,
                }
                for index in range(number)
            ]
            for split, number in splits.items()
        }
        features = datasets.Features(features | (more or {}))
        for row in (row for part in rows.values() for row in part):
            row |= dict.fromkeys(features.keys() - row.keys())
        made = {k: datasets.Dataset.from_list(v, features=features) for k, v in rows.items()}
        datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
        return f"hf:{tmp_path}/set"

    return write


def content(index):
    return encoded(picture(index, (8, 6 + index % 2), MODES[index % 3]), format="PNG")


def test_a_saved_set_is_read(written):
    opened = open_dataset(DataConfig(dataset=written({"train": 40, "test": 10})))
    assert opened.class_names == ("cat", "dog") and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [36, 4, 10]
    np.testing.assert_array_equal(opened.test.labels, [0, 1] * 5)
    for index in range(10):
        reference = picture(index, (8, 6 + index % 2), MODES[index % 3]).convert("RGB")
        np.testing.assert_array_equal(opened.test[index], np.asarray(reference))
    copy = pickle.loads(pickle.dumps(opened.test))
    np.testing.assert_array_equal(copy[3], opened.test[3])


def test_gray_and_other_names_of_columns_and_splits(written):
    name = written({"train": 20, "valid": 6}, image="img", label="fine")
    opened = open_dataset(DataConfig(dataset=name, grayscale=True))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [18, 2, 6]
    reference = Image.fromarray(open_dataset(DataConfig(dataset=name)).test[0]).convert("L")
    np.testing.assert_array_equal(opened.test[0][..., 0], np.asarray(reference))


def test_a_column_of_the_usual_name_and_another_kind_is_not_passed_over(written):
    """The only column of labels may tell something else."""
    datasets = pytest.importorskip("datasets")
    name = written({"train": 20}, label="source", more={"label": datasets.Value("int64")})
    with pytest.raises(InputError, match="one column of the type ClassLabel, .* label source have"):
        open_dataset(DataConfig(dataset=name))


def test_an_unlabelled_split_is_left_out(written):
    name = written({"train": 20, "validation": 6, "test": 5}, unlabelled=("test",))
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [18, 2, 6]
    assert list(opened.remarks()) == [f"left out: 5 of 5 images of {name}/test, without labels"]


@pytest.mark.parametrize(
    "names",
    [("Train", "dev", "testing"), ("training", "val", "TEST"), ("train", "validation", "Testing")],
)
def test_splits_have_many_names(written, names):
    opened = open_dataset(DataConfig(dataset=written(dict(zip(names, (20, 4, 6), strict=True)))))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [20, 4, 6]
    assert not list(opened.remarks())


def test_splits_that_are_not_used_are_named(written):
    name = written({"valid": 8, "validation": 6, "extra": 4, "train": 20})
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [18, 2, 6]
    lines = [f"left out: the split {split} of {name}" for split in ("extra", "valid")]
    assert list(opened.remarks()) == lines
    refused(written({"extra": 4}), "no train split", "extra")


def test_images_without_a_label_are_left_out_and_counted(written):
    name = written({"train": 20, "test": 6}, unlabelled=[("test", 3), ("train", 0)])
    opened = open_dataset(DataConfig(dataset=name, validation_fraction=0))
    assert opened.test.labels.tolist() == [0, 1, 0, 0, 1] and len(opened.train) == 19
    reference = picture(4, (8, 6), MODES[1]).convert("RGB")
    np.testing.assert_array_equal(opened.test[3], np.asarray(reference))
    counts = ("1 of 6", "test"), ("1 of 20", "train")
    lines = [f"left out: {n} images of {name}/{split}, without labels" for n, split in counts]
    assert sorted(opened.remarks()) == sorted(lines)
    assert opened.test.file(3).getvalue() == content(4)  # as shards.py takes it


def test_names_of_classes_are_in_one_form_of_unicode(written):
    opened = open_dataset(DataConfig(dataset=written({"train": 20}, names=["cafe\u0301", "tea"])))
    assert opened.class_names == ("café", "tea")
    refused(written({"train": 20}, names=["cafe\u0301", "café"]), "look alike", "caf\\xe9")


def test_splits_with_other_classes_or_columns_are_refused(written, tmp_path):
    import datasets

    name = written({"train": 20, "test": 4})
    sets = datasets.load_from_disk(str(tmp_path / "set"))
    swapped = sets["test"].cast_column("label", datasets.ClassLabel(names=list(NAMES[::-1])))
    for fault, words in (
        (swapped, ("split test has the classes dog, cat", "train has cat, dog")),
        (sets["test"].remove_columns("label"), ("no image classification set",)),
    ):
        place = str(tmp_path / words[0][:5])
        datasets.DatasetDict({"train": sets["train"], "test": fault}).save_to_disk(place)
        refused(f"hf:{place}", *words)
    assert len(open_dataset(DataConfig(dataset=name)).test) == 4


def test_shards_of_a_saved_set_are_the_same_data(written, tmp_path):
    name = written({"train": 12, "test": 4})
    outcome = run_script("shards.py", name, tmp_path / "out", "--images-per-shard", 5)
    assert outcome.status == 0 and outcome.out.count("train-") == 3, outcome.err
    ours = open_dataset(DataConfig(dataset=f"arrayrecord:{tmp_path}/out", validation_fraction=0))
    theirs = open_dataset(DataConfig(dataset=name, validation_fraction=0))
    np.testing.assert_array_equal(ours.train.labels, theirs.train.labels)
    for index in range(12):
        np.testing.assert_array_equal(ours.train[index], theirs.train[index])


def test_bad_images_are_named(written):
    name = written({"train": 8})
    source = open_dataset(DataConfig(dataset=name, validation_fraction=0, test_fraction=0)).train
    images = {"bytes": b"broken", "path": None}, None, {"bytes": None, "path": "/no/such.png"}
    object.__setattr__(source.records, "rows", [{"image": image} for image in images])
    for index, words in enumerate([r"set/train\[0\]", r"set/train\[1\]", "/no/such.png"]):
        with pytest.raises(BadImage, match=f"{words}: not a readable image"):
            source[index]


def test_sets_of_other_columns_are_refused(written, tmp_path):
    import datasets

    refused(written({"test": 4}), "no train split", "test")
    more = {"coarse": datasets.ClassLabel(names=["pet", "wild"])}
    refused(written({"train": 4}, label="fine", more=more), "fine, coarse have that type")


def test_a_set_that_is_not_there_is_one_line(written, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(f"hf:{tmp_path}/empty", "empty")


def test_without_a_home_nothing_is_downloaded(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "~/.cache/huggingface/datasets")
    refused("hf:ethz/food101", "there is no home directory", "set HF_HOME")


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:ethz/food101", "uv run --extra datasets", "pip install '.[datasets]'")
