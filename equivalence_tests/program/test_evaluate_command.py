"""The evaluate command: figures of a run on its own and on other data."""

import csv
import json
import shutil
import weakref
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.insects import train_on, write_folder
from flax_resnet.commands import cross_validate, evaluate
from flax_resnet.config import TrainConfig
from flax_resnet.interop.loaded_run import LoadedRun, load_run
from flax_resnet.runs import plots


def test_evaluate_repeats_the_report(insects, tmp_path):
    report = json.loads((insects / "report.json").read_text())
    for split in ("test", "validation", "train"):
        outcome = run_script(
            "evaluate.py", insects, "--split", split, "--json", tmp_path / "out.json"
        )
        assert outcome.status == 0, outcome.err
        figures = json.loads((tmp_path / "out.json").read_text())
        assert figures["images"] == {"test": 24, "validation": 3, "train": 21}[split]
        for name, value in report["splits"][split].items():
            assert figures[name] == pytest.approx(value, abs=1e-6)


def test_evaluate_takes_another_set_with_the_same_classes(insects, tmp_path):
    other = write_folder(tmp_path / "other", splits=("train", "val", "test"), per_class=5)
    outcome = run_script(
        "evaluate.py", insects, "--dataset", f"folder:{other}", "--split", "all",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 30


def test_evaluate_names_what_it_leaves_out(tmp_path):
    root = write_folder(tmp_path / "data")
    assert train_on(root, tmp_path / "run", "--on-bad-image", "skip", "--epochs", 1).status == 0
    other = write_folder(tmp_path / "other", splits=("train", "val", "test"), per_class=5)
    (other / "test" / "bee" / "00.png").write_bytes(b"")
    flags = ["--dataset", f"folder:{other}", "--json", tmp_path / "out.json"]
    outcome = run_script("evaluate.py", tmp_path / "run", *flags)
    assert outcome.status == 0 and "left out: " in outcome.out and "00.png" in outcome.out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["images"], figures["left_out_images"]) == (9, 1)


def test_evaluate_takes_all_of_a_set_too_small_to_split(insects, tmp_path):
    other = write_folder(tmp_path / "other", splits=(".",), per_class=1)
    outcome = run_script("evaluate.py", insects, "--dataset", f"folder:{other}", "--split", "all")
    assert outcome.status == 0, outcome.err
    assert f"all: 2 images of folder:{other}" in outcome.out


def test_evaluate_refuses_what_does_not_fit(insects, tmp_path):
    refused(run_script("evaluate.py", insects, "--split", "tset"), "tset", "'test'")
    refused(run_script("evaluate.py", insects, "--dataset", "digts"), "digts", "'digits'")
    refused(run_script("evaluate.py", tmp_path), "config.json")
    refused(run_script("evaluate.py", insects, "--dataset", "digits"), "ant", "classes")


def test_evaluate_masks_what_cannot_be_read(insects, folder, tmp_path):
    """Unreadable images are masked with --on-bad-image skip; otherwise all are named."""
    shutil.copytree(folder, tmp_path / "data")
    for name in ("test/bee/03.png", "test/ant/05.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    flags = ["--dataset", f"folder:{tmp_path}/data"]
    refused(run_script("evaluate.py", insects, *flags), "05.png", "03.png", "--on-bad-image skip")
    outcome = run_script("evaluate.py", insects, *flags, "--on-bad-image", "skip", "--json", "-")
    assert outcome.status == 0 and outcome.err.count("left out: ") == 2
    assert "top 2" in outcome.err and "top 5" not in outcome.err
    figures = json.loads(outcome.out)
    assert (figures["images"], figures["left_out_images"]) == (22, 2)
    assert "05.png: not a readable image" in figures["left_out"][0]
    for name in ("test/bee/03.png", "test/ant/05.png"):
        (tmp_path / "data" / name).unlink()
    outcome = run_script("evaluate.py", insects, *flags, "--json", "-")
    assert json.loads(outcome.out)["loss"] == pytest.approx(figures["loss"], rel=1e-6)


class Row(dict):
    """A row of which a set of weak references can tell how many are in memory."""

    __hash__ = object.__hash__


@pytest.fixture
def most_rows(monkeypatch):
    """Lets evaluations have 200 batches of 50 images; returns the most rows in memory so far."""
    alive, most = weakref.WeakSet(), [0]
    names = ("accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro")

    def measure(run, dataset, split, left_out, each=None):
        batch = {"image": np.zeros((50, 4, 4, 3), np.uint8), "mask": np.ones(50, bool)}
        facts = {"label": "ant", "prediction": "bee", "probability": 0.5}
        for number in range(200):
            rows = [Row(facts, path=f"{number}/{index}", loss=index) for index in range(50)]
            alive.update(rows)
            most[0] = max(most[0], len(alive))
            each.add(rows, batch)
        return dict.fromkeys(("loss", *names), 0.5), 10_000

    monkeypatch.setattr(evaluate, "measure", measure)
    return most


def test_rows_of_predictions_are_written_as_they_come(insects, tmp_path, most_rows):
    """Only the 60 worst of all images are kept, and those of two batches."""
    places = ["--predictions", tmp_path / "p.csv", "--worst", tmp_path / "worst.html"]
    outcome = run_script("evaluate.py", insects, *places)
    assert outcome.status == 0, outcome.err
    assert len(list(csv.DictReader((tmp_path / "p.csv").open()))) == 10_000
    assert 50 <= most_rows[0] <= 60 + 2 * 50
    assert (tmp_path / "worst.html").read_text().count("<figure>") == 60


def test_the_confusion_matrix_counts_the_predictions(insects, tmp_path, monkeypatch):
    draw = Mock(wraps=plots.confusion_matrix)
    monkeypatch.setattr(plots, "confusion_matrix", draw)
    table, picture = tmp_path / "p.csv", tmp_path / "confusion.png"
    flags = ["--predictions", table, "--confusion-matrix", picture, "--split", "all"]
    assert run_script("evaluate.py", insects, *flags).status == 0
    pairs = Counter((row["label"], row["prediction"]) for row in csv.DictReader(table.open()))
    _, counts, names = draw.call_args.args
    assert counts.tolist() == [[pairs[true, taken] for taken in names] for true in names]
    assert names == ("ant", "bee") and counts.sum() == 48
    assert Image.open(picture).size[0] > 400
    wrong = ["--confusion-matrix", tmp_path / "a.pdf"]
    refused(run_script("evaluate.py", insects, *wrong), "--confusion-matrix", "ends in .png")


def test_rows_of_all_folds_are_written_as_they_come(tmp_path, monkeypatch, most_rows):
    run = LoadedRun(TrainConfig(), ("ant", "bee"), 3, network=None, variables=None)
    monkeypatch.setattr(cross_validate, "class_names", lambda run_dir: run.class_names)
    monkeypatch.setattr(cross_validate, "load_run", lambda run_dir: run)
    monkeypatch.setattr(evaluate, "open_data", lambda *_: None)
    folders = [tmp_path / "a", tmp_path / "b"]
    figures, pool = cross_validate.all_predictions(tmp_path, folders, "digits")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["fold"] for row in rows] == ["0"] * 10_000 + ["1"] * 10_000
    assert most_rows[0] <= 2 * 50 and len(figures) == 2
    assert pool.counts.tolist() == [[0, 20_000], [0, 0]]
    assert pool.figures()["loss"] == pytest.approx(24.5, abs=1e-9)


def test_a_table_of_predictions_gets_its_name_when_it_is_whole(insects, tmp_path, monkeypatch):
    def measure(run, dataset, split, left_out, each=None):
        each.add([], {"image": np.zeros((0, 4, 4, 3)), "mask": np.ones(0, bool)})
        return {"loss": float("nan")}, 0

    monkeypatch.setattr(evaluate, "measure", measure)
    outcome = run_script("evaluate.py", insects, "--predictions", tmp_path / "p.csv")
    assert outcome.status == 1 and "the loss is nan, not a number" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_converted_run_knows_its_data(insects, folder, tmp_path):
    data, run, file = tmp_path / "data", tmp_path / "run", tmp_path / "weights.safetensors"
    shutil.copytree(folder, data)
    assert run_script("convert.py", insects, file).status == 0
    assert run_script("convert.py", file, run, "--dataset", f"folder:{data}").status == 0
    assert run_script("convert.py", run, tmp_path / "again").status == 0
    assert run_script("evaluate.py", tmp_path / "again").status == 0
    shutil.copy(data / "train/bee/00.png", data / "train/bee/new.png")
    refused(run_script("evaluate.py", run), "the data have changed")
    refused(run_script("evaluate.py", tmp_path / "again"), "the data have changed")


@pytest.fixture
def undivided(tmp_path):
    """A run on a folder without splits of its own, and the folder."""
    data = write_folder(tmp_path / "data", splits=(".",), per_class=20)
    assert train_on(data, tmp_path / "run", "--epochs", 1).status == 0
    return tmp_path / "run", data


def test_changed_data_of_the_run_are_refused_by_name_too(undivided):
    run, data = undivided
    flags = ["--dataset", f"folder:{data}"]
    assert run_script("evaluate.py", run, *flags).status == 0
    shutil.copy(data / "bee/00.png", data / "bee/new.png")
    refused(run_script("evaluate.py", run, *flags), "the data have changed")
    assert run_script("evaluate.py", run, *flags, "--split", "all").status == 0


def test_changed_data_of_a_fold_are_refused_under_any_name(tmp_path):
    data = write_folder(tmp_path / "data", splits=(".",), per_class=20)
    folds = ["--folds", 2, "--fold", 0]
    assert train_on(data, tmp_path / "run", "--epochs", 1, *folds).status == 0
    shutil.copy(data / "bee/00.png", data / "bee/new.png")
    (tmp_path / "link").symlink_to(data)
    for place in (data, f"{data}/", tmp_path / "link"):
        outcome = run_script("evaluate.py", tmp_path / "run", "--dataset", f"folder:{place}")
        refused(outcome, "the data have changed")


def test_changed_data_that_bring_their_test_split_are_evaluated(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "data")
    flags = ["--dataset", f"folder:{tmp_path / 'data'}"]
    assert train_on(tmp_path / "data", tmp_path / "run", "--epochs", 1).status == 0
    (tmp_path / "data/test/bee/00.png").unlink()
    outcome = run_script("evaluate.py", tmp_path / "run", *flags)
    assert outcome.status == 0 and "test: 23 images" in outcome.out, outcome


def test_a_converted_head_is_in_the_order_of_the_data(insects, folder, tmp_path):
    """The run of the weights has its classes in another order."""
    weights, turned = tmp_path / "weights.safetensors", tmp_path / "turned"
    assert run_script("convert.py", insects, weights).status == 0
    own = load_run(insects)
    data = own.config.data
    flags = ["--class-names", "bee,ant", "--image-size", data.image_size]
    flags += ["--mean", *data.mean, "--std", *data.std]
    assert run_script("convert.py", weights, turned, *flags).status == 0
    back = tmp_path / "back"
    outcome = run_script("convert.py", turned, back, "--dataset", f"folder:{folder}")
    assert outcome.status == 0, outcome.err
    images = np.random.default_rng(0).integers(0, 256, (4, *own.image_shape), np.uint8)
    turned, back = load_run(turned), load_run(back)
    assert (turned.class_names, back.class_names) == (("bee", "ant"), ("ant", "bee"))
    np.testing.assert_allclose(back.predict(images), turned.predict(images)[:, ::-1], atol=1e-6)


def test_the_resize_goes_with_the_size_that_a_conversion_replaces(insects, tmp_path):
    for size in (8, 40):
        run = tmp_path / str(size)
        assert run_script("convert.py", insects, run, "--image-size", size).status == 0
        data = load_run(run).config.data
        assert (data.image_size, data.resize_size) == (size, size)
    wide, same = tmp_path / "wide", tmp_path / "same"
    assert run_script("convert.py", insects, wide, "--resize-size", 50).status == 0
    size = load_run(wide).config.data.image_size
    assert run_script("convert.py", wide, same, "--image-size", size).status == 0
    assert load_run(same).config.data.resize_size == 50


def test_a_member_may_be_called_ensemble(insects, folder, tmp_path, monkeypatch):
    assert train_on(folder, tmp_path / "ensemble", "--epochs", 1, "--seed", 1).status == 0
    shutil.copytree(insects, tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    alone, both = (
        json.loads(run_script("evaluate.py", *names, "--json", "-").out)
        for names in (["ensemble"], ["ensemble", "first"])
    )
    assert both["members"]["ensemble"]["loss"] == alone["loss"] != both["loss"]
