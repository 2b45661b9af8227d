"""Cross-validation: the folds of both frameworks, and the command that trains on all of them."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

import torch_ref.sources
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.image_folder import fill
from flax_resnet.commands import cli, cross_validate, evaluate, train
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.training.restore import pretrained


def config(fold, folds=4, **settings):
    return DataConfig(folds=folds, fold=fold, split_seed=3, validation_fraction=0.0, **settings)


def test_folds_are_those_of_scikit_learn():
    labels = load_digits().target
    expected = StratifiedKFold(4, shuffle=True, random_state=3).split(labels, labels)
    for fold, (stay, off) in enumerate(expected):
        dataset = open_dataset(config(fold))
        np.testing.assert_array_equal(dataset.train.indices, stay)
        np.testing.assert_array_equal(dataset.test.indices, off)


@pytest.mark.control
def test_another_seed_gives_other_folds():
    other = open_dataset(DataConfig(folds=4, fold=0, split_seed=4, validation_fraction=0.0))
    assert not np.array_equal(other.test.indices, open_dataset(config(0)).test.indices)


def test_both_frameworks_have_the_same_folds():
    ours, theirs = open_dataset(config(1)), torch_ref.sources.open_dataset(config(1))
    for split, source in ("train", ours.train), ("test", ours.test):
        np.testing.assert_array_equal(source.labels, theirs.splits[split].labels)
        images = [source[index][..., 0] for index in range(len(source))]
        np.testing.assert_array_equal(images, theirs.splits[split].items)


def test_a_test_split_of_the_data_set_is_left_out(tmp_path):
    for place in "train/a", "train/b", "test/a", "test/b":
        fill(tmp_path / place, 4)
    dataset = open_dataset(config(1, folds=2, dataset=f"folder:{tmp_path}"))
    assert all("train" in name for name in dataset.test.names)
    assert len(dataset.test) == len(dataset.train)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"folds": 3}, "`folds` and `fold` are given together"),
        ({"fold": 0}, "`folds` and `fold` are given together"),
        ({"folds": 3, "fold": 3}, "`fold` 3 does not exist: there are 0 to 2"),
    ],
)
def test_a_fold_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("framework", [open_dataset, torch_ref.sources.open_dataset])
def test_more_folds_than_images_of_a_class_are_refused(framework):
    with pytest.raises(InputError, match=r"`folds` 175 .* 174 images of the smallest class \(8\)"):
        framework(config(0, folds=175))


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--folds", 3, "--fold", 3), "--fold 3 does not exist: there are 0 to 2"),
        (
            ("--folds", 175, "--fold", 0),
            "174 images of the smallest class (8)",
        ),
    ],
)
def test_the_command_refuses_such_folds_in_one_line(tmp_path, flags, words):
    refused(run_script("train.py", "--run-dir", tmp_path / "run", *flags), words)
    assert not (tmp_path / "run").exists()


def test_the_help_of_a_cross_validation_lists_no_flag_that_it_refuses():
    text = run_script("cross_validate.py", "--help").out
    assert "--folds INT" in text and "--fold INT" not in text


def test_the_number_of_folds_is_bounded_before_a_list_is_made(monkeypatch, tmp_path):
    command = ["cross_validate.py", "--folds", "2147483647", "--run-dir", str(tmp_path / "cv")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(InputError, match="--folds.* 1000, got '2147483647'"):
        cross_validate.main()
    assert not (tmp_path / "cv").exists()


def run(monkeypatch, folder, *flags):
    small = ("--arch", "basic_cnn", "--epochs", "1", "--train-images", "64", "--batch-size", "32")
    command = ["cross_validate.py", "--folds", "2", "--run-dir", str(folder), *small, *flags]
    monkeypatch.setattr("sys.argv", command)
    cross_validate.main()


def test_the_command_pools_the_predictions_of_all_folds(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path / "cv")
    found = json.loads((tmp_path / "cv/cross_validation.json").read_text())
    with (tmp_path / "cv/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert found["images"] == len(rows) == len(load_digits().target)
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert found["pooled"]["accuracy"] == pytest.approx(right, abs=1e-12)
    assert np.trace(found["confusion"]) == round(right * len(rows))
    accuracies = [fold["accuracy"] for fold in found["folds"]]
    assert found["mean"]["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert found["deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-12)

    monkeypatch.setattr(cross_validate.fit, "fit", None)  # finished folds are not trained again
    run(monkeypatch, tmp_path / "cv")
    assert (
        json.loads((tmp_path / "cv/cross_validation.json").read_text())["folds"] == found["folds"]
    )
    with pytest.raises(InputError, match="was begun with other flags: .*lr.*another --run-dir"):
        run(monkeypatch, tmp_path / "cv", "--lr", "0.01")

    # Its own data by name: the images on which the fold was not trained.
    first = load_run(tmp_path / "cv/fold-0")
    by_name = evaluate.open_data(first, first.config.data.dataset, "test")
    np.testing.assert_array_equal(
        by_name.test.indices, evaluate.open_data(first, None, "test").test.indices
    )
    assert len(evaluate.open_data(first, first.config.data.dataset, "all").train) == len(rows)
    asked = SimpleNamespace(
        dataset="digits", split="test", fold_batchnorm=False, average="probabilities"
    )
    with pytest.raises(InputError, match="fold-1 divides its data otherwise"):
        evaluate.opened_all([str(tmp_path / "cv/fold-0"), str(tmp_path / "cv/fold-1")], asked)


def test_finished_folds_of_other_data_are_refused(tmp_path, monkeypatch):
    for name, count in ("v1", 40), ("v2", 44):
        for place in "a", "b":
            fill(tmp_path / name / "birds" / place, count)
    small = ("--train-images", "32", "--batch-size", "16", "--image-size", "16")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "cv", *small, "--dataset", "folder:v1/birds")
    with pytest.raises(InputError, match="the data have changed"):
        run(monkeypatch, "cv", *small, "--dataset", "folder:v2/birds")


def test_finished_folds_are_pooled_where_their_data_are_now(tmp_path, monkeypatch):
    for name in "a", "b":
        fill(tmp_path / "before" / name, 40)
    small = ("--train-images", "32", "--batch-size", "16", "--image-size", "16")
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "cv", *small, "--dataset", "folder:before")
    (tmp_path / "before").rename("after")
    run(monkeypatch, "cv", *small, "--dataset", "folder:after")
    with open("cv/predictions.csv") as file:
        assert all(row["path"].startswith("after/") for row in csv.DictReader(file))
    for path in (tmp_path / "after").rglob("*.png"):  # other images of the same names
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(InputError, match="the data have changed .* files"):
        run(monkeypatch, "cv", *small, "--dataset", "folder:after")


@pytest.mark.parametrize(
    "own", [{"augment": {"auto_augment": "ta_wide"}}, {"optimizer": {"class_weights": "balanced"}}]
)
def test_a_setting_that_was_given_and_is_missing_now_is_another_one(own):
    with pytest.raises(InputError, match="was begun with other flags"):
        train.check_settings("cv/fold-0", TrainConfig(), cli.merge(TrainConfig(), own), "end")


def test_what_the_data_chose_is_no_other_setting():
    chosen = cli.merge(TrainConfig(), {"data": {"image_size": 16}, "model": {"num_classes": 10}})
    train.check_settings("cv/fold-0", TrainConfig(), chosen, "end")


def test_images_have_one_size_in_all_folds(monkeypatch):
    monkeypatch.setattr("sys.argv", ["cross_validate.py", "--folds", "3"])
    runs = cross_validate.configs(cross_validate.parse())
    assert [config.data.image_size for config in runs] == [16] * 3


def test_folds_do_not_begin_with_the_weights_of_a_fold(tmp_path, monkeypatch):
    (tmp_path / "cv/fold-0").mkdir(parents=True)
    with pytest.raises(InputError, match="has seen images on which folds are tested"):
        cross_validate.check_source(tmp_path / "cv", str(tmp_path / "cv/fold-0"), "digits")
    cross_validate.check_source(tmp_path / "cv", str(tmp_path / "other"), "digits")


def test_folds_do_not_begin_with_a_run_on_their_images(insects, folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    for data in (folder, link):
        with pytest.raises(InputError, match="has seen images on which folds are tested"):
            cross_validate.check_source(tmp_path / "cv", str(insects), f"folder:{data}")
    cross_validate.check_source(tmp_path / "cv", str(insects), f"folder:{tmp_path}")
    copy = tmp_path / "copy"
    assert run_script("convert.py", insects, copy).status == 0
    with pytest.raises(InputError, match="has seen images on which folds are tested"):
        cross_validate.check_source(tmp_path / "cv", str(copy), f"folder:{folder}")
    assert pretrained(copy).divided == pretrained(insects).divided != {}
    weights, converted = tmp_path / "weights.safetensors", tmp_path / "converted"
    assert run_script("convert.py", insects, weights).status == 0
    assert run_script("convert.py", weights, converted, "--dataset", f"folder:{folder}").status == 0
    cross_validate.check_source(tmp_path / "cv", str(converted), f"folder:{folder}")


def test_finished_folds_notice_other_class_weights(folder, tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text('{"ant": 1, "bee": 2}')
    data = {"dataset": f"folder:{folder}", "folds": 2, "fold": 0}
    values = {"data": data, "model": {"arch": "basic_cnn"}}
    values["optimizer"] = {"class_weights": str(weights)}
    config = cli.merge(TrainConfig(epochs=1, batch_size=8), values)
    cross_validate.trained(config, tmp_path / "run")
    cross_validate.trained(config, tmp_path / "run")
    weights.write_text('{"ant": 1, "bee": 3}')
    with pytest.raises(InputError, match="the data have changed .* class weights"):
        cross_validate.trained(config, tmp_path / "run")
