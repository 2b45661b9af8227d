"""Data sets prepared by TensorFlow Datasets, read without TensorFlow."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.image_folder import encoded, picture, refused
from flax_resnet.config import DataConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    """Writes a prepared data set with images per split, a label feature and image modes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    def make(set_name, splits, label=None, modes=("RGB",), unlabelled=()):
        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = set_name
            VERSION = tfds.core.Version("1.2.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 1 if modes == ("L",) else 3)),
                    "label": label or tfds.features.ClassLabel(names=["cat", "dog"]),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {split: self._generate_examples(split, n) for split, n in splits.items()}

            def _generate_examples(self, split, number):
                for index in range(number):
                    image = picture(index, (8, 6 + index % 2), modes[index % len(modes)])
                    yield index, {"image": image, "label": -1 if split in unlabelled else index % 2}

        Builder(data_dir=folder).download_and_prepare(file_format="array_record")
        return f"tfds:{set_name}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield make


def test_prepared_tfds_sets_are_read(tfds_set):
    opened = open_dataset(DataConfig(dataset=tfds_set("pets", {"train": 40, "test": 10})))
    assert opened.class_names == ("cat", "dog") and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [36, 4, 10]
    np.testing.assert_array_equal(sorted(opened.test.labels), [0] * 5 + [1] * 5)
    shown = {opened.test[index].tobytes() for index in range(10)}
    assert shown == {np.asarray(picture(i, (8, 6 + i % 2))).tobytes() for i in range(10)}
    copy = pickle.loads(pickle.dumps(opened.test))
    np.testing.assert_array_equal(copy[3], opened.test[3])
    assert "tensorflow" not in sys.modules


def test_tfds_version_and_channels(tfds_set):
    name = tfds_set("gray_pets", {"train": 30, "validation": 8}, modes=("L",))
    opened = open_dataset(DataConfig(dataset=f"{name}:1.2.0"))
    assert opened.channels == 1 and opened.train[0].shape[-1] == 1
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [27, 3, 8]
    refused(f"{name}:9.9.9", "gray_pets:9.9.9", "tfds build")


def test_tfds_mixed_modes_and_grayscale(tfds_set):
    name = tfds_set("mixed_pets", {"train": 40}, modes=("RGB", "L", "RGBA"))
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [28, 4, 8]
    assert {opened.train[index].shape[-1] for index in range(28)} == {3}
    gray = open_dataset(DataConfig(dataset=name, grayscale=True))
    reference = Image.fromarray(opened.train[5]).convert("L")
    np.testing.assert_array_equal(gray.train[5][..., 0], np.asarray(reference))


def test_tfds_unlabelled_test_split(tfds_set):
    name = tfds_set("secret", {"train": 20, "validation": 6, "test": 5}, unlabelled=("test",))
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [18, 2, 6]
    assert [line for line in opened.remarks() if "5 of 5 images" in line and "/test" in line]


def test_tfds_splits_of_other_names(tfds_set):
    label = tfds_label(names=["cafe\u0301", "tea"])
    splits = {"training": 20, "dev": 4, "Test": 6, "unsupervised": 3}
    opened = open_dataset(DataConfig(dataset=tfds_set("drinks", splits, label=label)))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [20, 4, 6]
    assert opened.class_names == ("café", "tea")
    assert list(opened.remarks()) == ["left out: the split unsupervised of tfds:drinks/1.2.0"]


def tfds_label(names):
    return pytest.importorskip("tensorflow_datasets").features.ClassLabel(names=names)


def test_tfds_prepared_without_random_access(tfds_set):
    name = tfds_set("sequential", {"train": 20})
    path = Path(os.environ["TFDS_DATA_DIR"]) / "sequential/1.2.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    refused(name, "TFRECORD", "tfds build sequential", "--data_dir=NEW_FOLDER")


def test_tfds_refusals(tfds_set, monkeypatch):
    import tensorflow_datasets as tfds

    refused("tfds:no_such_set", "no_such_set", "not found", "tfds build no_such_set")
    name = tfds_set("numbers", {"train": 4}, label=tfds.features.Scalar(np.int64))
    refused(name, "image, label", "ClassLabel")
    refused(tfds_set("held_out", {"test": 4}), "no train split", "test")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: 1 / 0)
    refused("tfds:mnist", "division by zero", "tfds build mnist --file_format=array_record")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused("tfds:mnist", "uv run --extra tfds", "pip install '.[tfds]'")


def test_tfds_registered_set_under_mock_data(tmp_path, monkeypatch):
    """TFDS's own CIFAR-10 class, with made-up records."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    png = [encoded(picture(index, (32, 32)), format="PNG") for index in range(50)]
    records = [{"image": png[index], "label": index % 10} for index in range(50)]
    folder = tmp_path / "cifar10/3.0.2"
    folder.mkdir(parents=True)
    splits = [{"name": n, "shardLengths": ["50"], "numBytes": "1"} for n in ("train", "test")]
    info = {"name": "cifar10", "version": "3.0.2", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    fake = dict(
        data_dir=str(tmp_path), as_data_source_fn=lambda self, split, decoders=None: records
    )
    with tfds.testing.mock_data(**fake):
        opened = open_dataset(DataConfig(dataset="tfds:cifar10", validation_fraction=0.2))
    assert len(opened.class_names) == 10 and opened.train[0].shape == (32, 32, 3)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [40, 10, 50]
    with pytest.raises(InputError, match=r"tfds:cifar10.*\[0\]: not a readable image"):
        records[0] = {"image": b"broken", "label": 0}
        opened.test[0]
