"""The evaluate command: figures of a run on its own and on other data."""

import json
import shutil

import pytest

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.insects import train_on, write_folder


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
