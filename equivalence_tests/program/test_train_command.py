"""The train command: existing runs, resuming, broken images, losses that are no numbers."""

import csv
import json
from dataclasses import replace

import pytest

from equivalence_tests.program.command import refused, run_script, train
from equivalence_tests.program.insects import train_on, write_folder
from flax_resnet.recipes import RECIPES
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.training import guard


def test_an_existing_run_is_kept(insects, folder):
    before = (insects / "report.json").read_bytes()
    refused(train_on(folder, insects), "--resume", "--overwrite")
    assert (insects / "report.json").read_bytes() == before


def test_overwrite_replaces_a_run(folder, tmp_path):
    assert train_on(folder, tmp_path / "run", "--epochs", 1).status == 0
    assert train_on(folder, tmp_path / "run", "--epochs", 2, "--overwrite").status == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["epochs"] == 2
    assert len(list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))) == 2


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_other_directories_are_left_alone(folder, tmp_path, flag):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(train_on(folder, tmp_path, flag), "is no run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_refuses_other_flags(insects):
    for flag, value, own in (("--epochs", 9, "epochs 9 (the run has 4)"),
                              ("--dataset", "digits", "data.dataset 'digits'")):  # fmt: skip
        outcome = run_script("train.py", "--resume", "--run-dir", insects, flag, value)
        refused(outcome, "other flags", own, "--init-from")


def test_resume_alone_names_the_runs_that_could_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run_script("train.py", "--resume"), "--resume needs --run-dir")
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    refused(run_script("train.py", "--resume"), "runs/ holds runs/one, runs/two")


def test_resume_refuses_another_recipe_and_config(insects, tmp_path):
    """The run's own config is accepted."""
    other = json.loads((insects / "config.json").read_text()) | {"seed": 7}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for begun in (
        ["--recipe", "imagenette-cnn"],
        ["--config", tmp_path / "other.json"],
        ["--smoke"],
    ):
        refused(run_script("train.py", "--resume", "--run-dir", insects, *begun), "other flags")
    outcome = run_script(
        "train.py", "--resume", "--run-dir", insects, "--config", insects / "config.json"
    )
    assert outcome.status == 0 and "finished" in outcome.out


@pytest.mark.parametrize("name", ["cifar10-fast", "imagenette-cnn"])
def test_the_command_that_began_a_recipe_resumes_it(tmp_path, name):
    """Settings that the recipe leaves open, and the run has filled in, are no difference."""
    data = replace(RECIPES[name].config.data, dataset="folder:x", resize_size=99)
    data = replace(data, mean=data.mean or (0.5,) * 3, std=data.std or (1.0,) * 3)
    own = replace(RECIPES[name].config, data=data, epochs=3)
    own = replace(own, augment=replace(own.augment, random_crop=own.augment.random_crop or 0))
    RunDirectory(tmp_path / "run").write_config(own)
    flags = ["--recipe", name, "--dataset", "folder:x", "--resume", "--run-dir", tmp_path / "run"]
    refused(run_script("train.py", *flags, "--epochs", 3), "folder:x: no such folder")
    refused(run_script("train.py", *flags), "other flags")


@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "no image", "truncated"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_images_are_named_or_left_out(tmp_path, split, content):
    """Images of the test split are read too, before the training begins."""
    root = write_folder(tmp_path / "data")
    broken = root / split / "bee" / "05.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    refused(train_on(root, tmp_path / "run"), str(broken))
    assert not (tmp_path / "run").exists()
    (root / split / "bee" / "note.heic").write_text("no name of an image")
    outcome = train_on(root, tmp_path / "run", "--on-bad-image", "skip", "--epochs", 1)
    assert outcome.status == 0 and f"left out: {broken}" in outcome.out
    assert "passed over: 1 file(s)" in outcome.out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["left_out_images"] == 1


def test_a_broken_image_of_an_uncached_set_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "bee" / "05.png").write_bytes(b"")
    refused(train_on(root, tmp_path / "run", "--cache", "none"), "05.png")


def test_a_class_without_images_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "cow").mkdir()
    refused(train_on(root, tmp_path / "run"), "cow")


@pytest.mark.parametrize("lr", ["1e30"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, lr):
    outcome = train(tmp_path / "run", "--optimizer", "sgd", "--lr", lr, "--schedule", "constant")
    assert outcome.status == 1
    assert "step 2" in outcome.err and "--lr" in outcome.err
    assert "there is no checkpoint yet; begin again" in outcome.err
    assert "--init-from" not in outcome.err
    assert outcome.err.count("\n") == 1


def test_it_names_the_checkpoint_to_go_on_from():
    error = guard.fault_of_step(21, {"loss": 2, "gradient_norm": 3}, 20, "run")
    words = ("step 21", "last finite loss 2,", "checkpoint of step 20 in run; `init_from` it in")
    assert all(part in str(error) for part in words)


@pytest.mark.parametrize(
    "finite, before, allowed, expected",
    [
        ([True, False, False], 0, 0, (1, 1)),
        ([True, False, False], 0, 1, (2, 2)),
        ([True, False, False], 0, 2, (None, 2)),
        ([False, True], 1, 1, (0, 2)),
        ([True, True], 5, 0, (None, 0)),
    ],
)
def test_the_guard_stops_at_the_first_step_too_many(finite, before, allowed, expected):
    rows = [{"finite": each} for each in finite]
    assert guard.first_fault(rows, before, allowed) == expected


@pytest.mark.parametrize("epochs,words", [(1, "loss after epoch 1"), (2, "epoch 2: no step")])
def test_a_run_whose_skipped_steps_leave_no_numbers_has_no_report(tmp_path, epochs, words):
    """The first update is finite and enormous; all later gradients are skipped."""
    outcome = train(
        tmp_path / "run", "--optimizer", "sgd", "--lr", 1e10, "--skip-nonfinite", 1000,
        "--schedule", "constant", "--epochs", epochs,
    )  # fmt: skip
    assert outcome.status == 1 and words in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "run" / "report.json").exists()


def test_how_a_run_is_evaluated_may_change(insects):
    outcome = run_script("train.py", "--resume", "--run-dir", insects, "--eval-batch-size", 7)
    assert outcome.status == 0 and "nothing to do" in outcome.out
