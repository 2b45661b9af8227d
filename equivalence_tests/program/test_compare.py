"""Files beside the checkpoints are views of a run: the commands that show them do not believe them.

Each test damages a file of a finished run without a training.
"""

import json
import math
import os
from pathlib import Path

import pytest

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.run_directory import without_training
from equivalence_tests.studies import reproduce, reproduction
from flax_resnet.commands import compare, cross_validate, outcomes
from flax_resnet.errors import InputError
from flax_resnet.runs import tables, views
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.display import Display, results_table

REPORT = {"splits": {"test": {"accuracy": 0.5, "loss": math.nan}}, "images_per_second": 9.0}
ROWS = [{"epoch": 1, "loss": 0.5}]
NO_REPORTS = {
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"1" * 5000,
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe",
    "no splits": b"{}",
    "splits in a list": b'{"splits": []}',
    "figures in a list": b'{"splits": {"test": [0.5]}}',
    "figures of words": b'{"splits": {"test": {"accuracy": "high"}}}',
}


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a finished run."""
    directory = RunDirectory(without_training(tmp_path / "run"), resume=True)
    directory.write_report(REPORT)
    directory.close()
    assert views.faults(directory.path) == []
    return directory.path


@pytest.fixture
def old(run) -> Path:
    """The directory of a finished run of an earlier version, which has no digests."""
    [document] = (run / "checkpoints").glob("*/document/metadata")
    values = json.loads(document.read_text())
    del values["tables"]
    document.write_text(json.dumps(values))
    manifest = document.parents[1] / "manifest.json"
    digests = json.loads(manifest.read_text())
    digests["document/metadata"] = views._digest(document).decode()
    manifest.write_text(json.dumps(digests))
    (run / "SHA256SUMS").unlink()
    assert views.faults(run) == []
    return run


def pipe(path: Path):
    """A named pipe in the place of a file; whoever opened it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def edited(path: Path):
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9"))


def test_a_sound_run_is_read(run, capsys):
    course = compare.read(run)
    assert (course.rows, course.state, capsys.readouterr().err) == (ROWS, "", "")
    assert course.figures() == {"test_accuracy": 0.5, "images_per_second": 9.0}


@pytest.mark.parametrize("damage", [edited, pipe, Path.unlink, *NO_REPORTS])
def test_a_damaged_report_is_named_and_not_believed(run, capsys, damage):
    path = run / "report.json"
    path.write_bytes(NO_REPORTS[damage]) if damage in NO_REPORTS else damage(path)
    course = compare.read(run)
    assert (course.report, course.figures()) == ({}, {})
    state, words = " report damaged", f"{path} is not as the run wrote it\n"
    if damage is Path.unlink:
        state, words = " unfinished", ""
    assert (course.state, capsys.readouterr().err) == (state, words)


def test_a_report_whose_digest_is_gone_is_not_believed(run, capsys):
    edited(run / "report.json")
    (run / "SHA256SUMS").unlink()
    assert compare.read(run).figures() == {}
    assert "SHA256SUMS is missing" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [edited, pipe, Path.unlink])
def test_rows_come_from_the_copy_that_the_checkpoint_knows(run, capsys, damage):
    damage(run / "metrics.csv")
    assert compare.read(run).rows == ROWS
    assert f"{run / 'metrics.csv'} is " in capsys.readouterr().err
    damage(run / "checkpoints" / "metrics.csv")
    assert compare.read(run).rows == []


def test_the_command_says_what_it_does_not_believe(run, tmp_path):
    other = without_training(tmp_path / "other")
    edited(run / "report.json")
    outcome = run_script("compare.py", run, other, "--json", tmp_path / "out.json")
    assert outcome.status == 0 and "1/16 report damaged" in outcome.out
    assert "report.json is not as the run wrote it" in outcome.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["figures"] == {str(run): {}, str(other): {}}


@pytest.mark.parametrize("content", NO_REPORTS.values(), ids=NO_REPORTS)
def test_what_is_no_report_is_refused_in_a_line(old, content):
    """Nothing but its content speaks for the report of an earlier version."""
    assert compare.read(old).figures()["test_accuracy"] == 0.5
    path = old / "report.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="report.json is no") as error:
        compare.read(old)
    assert len(str(error.value)) < 500
    pipe(path)
    with pytest.raises(InputError, match="report.json is not readable"):
        compare.read(old)


def test_a_number_beyond_all_floats_is_no_figure(old):
    (old / "report.json").write_text('{"splits": {"test": {"accuracy": 1%s}}}' % ("0" * 400))
    assert compare.read(old).figures() == {}
    pipe(old / "metrics.csv")
    assert compare.read(old).rows == []


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("null")
    other = without_training(tmp_path / "other")
    refused(run_script("compare.py", run, other), "finished and has no sound checkpoint")


def test_the_curves_of_a_cross_validation_are_those_of_the_checkpoints(tmp_path, monkeypatch):
    for name in ("fold-0", "fold-1", "fold-2"):
        edited(without_training(tmp_path / name) / "metrics.csv")
    figures, pool = dict.fromkeys(cross_validate.SHOWN, 0.5), outcomes.Pool(("a",))
    pool.add([{"label": "a", "prediction": "a", "loss": 0.1}])
    drawn = {}
    for name, value in {
        "check": lambda root, runs: None,
        "trained": lambda config, run_dir: None,
        "all_predictions": lambda root, folders, place: ([figures, figures], pool),
        "write": lambda *given: drawn.update(given[-1]),
    }.items():
        monkeypatch.setattr(cross_validate, name, value)
    command = ["cross_validate.py", "--folds", "2", "--run-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    cross_validate.main()
    assert drawn == {"fold-0": ROWS, "fold-1": ROWS}


def test_a_recipe_whose_files_are_damaged_is_not_taken_over(run):
    assert reproduce.is_whole(run, "jax")
    edited(run / "report.json")
    assert not reproduce.is_whole(run, "jax")
    assert reproduce.is_whole(run, "torch")  # which has no digests
    (run / "report.json").write_text("[]")
    with pytest.raises(InputError, match="no report of a run"):
        reproduce.is_whole(run, "torch")
    assert not reproduce.is_whole(run / "nothing", "torch")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epochs": None}, "epochs is missing or wrong"),
        ({"environment": []}, "environment is missing or wrong"),
        ({"splits": {"test": {"accuracy": 0.5}}}, "train_accuracy, test_loss is missing or wrong"),
    ],
)
def test_the_table_of_recipes_refuses_a_report_without_its_facts(tmp_path, changes, words):
    report = {"epochs": 1, "seconds": 2.5, "command": "", "best_epoch": 1}
    report["environment"] = {"device": "a CPU"}
    report["splits"] = dict.fromkeys(("train", "test"), {"accuracy": 0.5, "loss": 1.0})
    path = tmp_path / "imagenette-cnn" / "seed0" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    assert len(reproduction.finished(tmp_path)) == 1
    path.write_text(json.dumps(report | changes))
    with pytest.raises(InputError, match=words):
        reproduction.finished(tmp_path)


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.csv")
    with pytest.raises(InputError, match="is no file"):
        tables.read_rows(tmp_path / "metrics.csv")


def test_no_picture_is_written_among_the_images(run, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    other = without_training(tmp_path / "other")
    monkeypatch.setattr("flax_resnet.data.sources.places", lambda name: [tmp_path / "images"])
    command = ["compare.py", str(run), str(other), "--plot", str(tmp_path / "images/curves.png")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(InputError, match="--plot: .*is one of the files that are read"):
        compare.main()


def test_no_figure_and_no_name_is_cut_off(run, monkeypatch, capsys):
    """In a terminal of 80 columns, with runs in deep folders."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"/data/experiments/{number}/birds-with-a-long-name" for number in range(4)]
    figures = dict.fromkeys(("loss", "accuracy", "top5_accuracy", "precision_macro"), 0.1234)
    figures |= dict.fromkeys(("recall_macro", "f1_macro"), 0.1234)
    course = compare.read(run)
    kept = dict.fromkeys(compare.FIGURES, 0.1234)
    monkeypatch.setattr(compare.Course, "figures", lambda self: kept)
    shown = [
        results_table(dict.fromkeys(names, figures)),
        compare.table_of_figures(dict.fromkeys(names, course)),
        compare.table_of_settings({"optimization.learning_rate": dict.fromkeys(names, 0.125)}),
    ]
    for table in shown:
        Display().show(table)
    out = capsys.readouterr().out
    assert "…" not in out and out.count("0.1234") == 2 * 4 * 6
    assert "validation" in out and "calibration" in out  # no word of a header is divided
