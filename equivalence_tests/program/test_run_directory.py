"""Run directories: which files are deleted, and which run owns a directory."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.run_directory import tree, write
from equivalence_tests.program.test_train import quiet, small
from flax_resnet import errors
from flax_resnet.commands import exits
from flax_resnet.config import TrainConfig
from flax_resnet.devices import distributed
from flax_resnet.devices.distributed import RunLost
from flax_resnet.errors import InputError
from flax_resnet.interop import export
from flax_resnet.models import create_model
from flax_resnet.runs import tables, views
from flax_resnet.runs.checkpoint import Checkpoints, newest_document, steps_in
from flax_resnet.runs.directory import RunDirectory, reserve
from flax_resnet.training import loop
from flax_resnet.training.fit import _open_directory, fit
from flax_resnet.weights import convert

HUGGING_FACE = '{"model_type": "bert", "hidden_size": 768}'


# Where a run can be


@pytest.mark.parametrize("name", ["a\\b", "gs:", os.fsdecode(b"caf\xe9")])
def test_a_name_that_checkpoints_would_leave_is_refused(tmp_path, name):
    """TensorStore writes into a/b instead."""
    outcome = run_script("train.py", "--arch", "basic_cnn", "--run-dir", tmp_path / name / "run")
    refused(outcome, "checkpoints cannot lie in a folder whose name")
    with pytest.raises(InputError, match="checkpoints cannot lie"):
        Checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


# Which files are deleted


@pytest.mark.parametrize("files", [
    {"config.json": HUGGING_FACE, "thesis/chapter.txt": "years"},
    {"config.json": HUGGING_FACE},
    {"config.json": "{", "run.lock": ""},
    {"config.json": "{}", "report.json": "of another program"},
    {"config.json": '{"epochs": 3}', "metrics.csv": "of another program"},
    {"report.json": "{}", "metrics.csv": "a\n1\n"},
    {"checkpoints/5/weights": "foreign"},
    {"run.lock": "", "photo.jpg": ""},
])  # fmt: skip
@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}, {}])
def test_what_is_no_run_is_refused_and_stays(tmp_path, files, how):
    for name, text in files.items():
        write(tmp_path / "place" / name, text)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="place"):
        RunDirectory(tmp_path / "place", **how)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [
    "notes.txt", "thesis/chapter.txt", "metrics.csv.bak", "config.json~", "checkpoints/notes.txt",
    "checkpoints/7/photo.jpg", "checkpoints/5/photo.jpg", "checkpoints/5/state/d/photo.jpg",
    "metrics.tmp/inside", "checkpoints/²/x", "run.lock2", "per_class.csv\n",
])  # fmt: skip
def test_a_foreign_entry_is_named_and_nothing_is_deleted(begun, name):
    write(begun / name)
    before = tree(begun)
    with pytest.raises(InputError, match="files that no run has written: .*nothing was deleted"):
        RunDirectory(begun, overwrite=True)
    assert tree(begun) == before
    RunDirectory(begun, resume=True).close()


def test_an_empty_foreign_folder_is_foreign_too(begun):
    (begun / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        RunDirectory(begun, overwrite=True)


def test_links_are_deleted_and_what_they_point_at_is_not(begun, tmp_path):
    """Links inside a run are deleted; a run directory that is a link stays one."""
    shutil.move(begun / "checkpoints", tmp_path / "scratch")
    (begun / "checkpoints").symlink_to(tmp_path / "scratch")
    mine = write(tmp_path / "mine.csv")
    (begun / "metrics.csv").unlink()
    (begun / "metrics.csv").symlink_to(mine)
    (begun / "curves.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "latest").symlink_to(begun)
    before = tree(tmp_path / "scratch")
    RunDirectory(tmp_path / "latest", overwrite=True).close()
    assert tree(begun).keys() == {"run.lock"} and mine.read_text() == "mine"
    assert tree(tmp_path / "scratch") == before and (tmp_path / "latest").is_symlink()


@pytest.mark.parametrize("name", [
    "metrics.csv", "checkpoints/metrics.csv", "config.tmp", "report.tmp", "SHA256SUMS.tmp",
    "curves.png", "curves.tmp", "error.log",
])  # fmt: skip
def test_nothing_is_written_through_a_link(begun, tmp_path, monkeypatch, name):
    """Links that wait in the directory are replaced; the log of an error goes elsewhere."""
    thesis = write(tmp_path / "thesis.tex", "years")
    if name.endswith("metrics.csv"):  # of which a run that goes on has nothing to write anew
        thesis.write_bytes((begun / name).read_bytes())
    before = thesis.read_bytes()
    (begun / name).unlink(missing_ok=True)
    (begun / name).symlink_to(thesis)
    directory = RunDirectory(begun, resume=True)
    directory.write_config(TrainConfig())
    directory.start_logs(newest_document(begun / "checkpoints", print), 5)
    directory.log_epoch(6, {"epoch": 2, "loss": 0.25}, {"epoch": 2, "seconds": 2.5})
    monkeypatch.setattr(directory, "rows", lambda: [{"epoch": 1, "train_accuracy": 0.5}])
    results = {"confusion": np.eye(2, dtype=int), "bins": np.ones((3, 10))}
    directory.write_results({"best_epoch": None, "splits": {}}, results, ["ant", "bee"])
    directory.close()
    error = RuntimeError("unforeseen")
    error.run_dir = begun
    status, line = errors.verdict(error)
    assert status == 1 and "the traceback is in" in line
    assert thesis.read_bytes() == before
    assert (begun / name).is_symlink() == (name == "error.log")


def test_a_row_is_not_appended_through_a_link(begun, tmp_path):
    thesis = write(tmp_path / "thesis.tex", "years")
    directory = RunDirectory(begun, resume=True)
    directory.start_logs(newest_document(begun / "checkpoints", print), 5)
    (begun / "metrics.csv").unlink()
    (begun / "metrics.csv").symlink_to(thesis)
    with pytest.raises(OSError, match="symbolic links"):
        directory.log_epoch(6, {"epoch": 2, "loss": 0.25}, {"epoch": 2, "seconds": 2.5})
    directory.close()
    assert thesis.read_text() == "years"


def test_a_log_is_added_to_the_one_before(begun):
    for words in ("first", "second"):
        error = RuntimeError(words)
        error.run_dir = begun
        assert str(begun / errors.LOG) in errors.verdict(error)[1]
    log = (begun / errors.LOG).read_text()
    assert "first" in log and "second" in log


def test_a_run_whose_config_is_damaged_is_still_a_run(begun):
    (begun / "config.json").write_text("{")
    RunDirectory(begun, overwrite=True).close()
    assert tree(begun).keys() == {"run.lock"}


def test_converted_weights_replace_a_run_and_nothing_else(begun, tmp_path, monkeypatch):
    """The run is the working directory and given as a link; the directory stays the same one."""
    weights = tmp_path / "weights.safetensors"
    export.write_safetensors(weights, convert.state_dict(create_model("basic_cnn", in_channels=1)))
    write(tmp_path / "bert" / "config.json", HUGGING_FACE)
    write(tmp_path / "bert" / "thesis" / "chapter.txt")
    before = tree(tmp_path / "bert")
    refused(run_script("convert.py", weights, tmp_path / "bert", "--overwrite"), "bert", "no run")
    assert tree(tmp_path / "bert") == before
    note = write(begun / "note.txt")
    outcome = run_script("convert.py", weights, begun, "--overwrite", "--dataset", "digits")
    refused(outcome, "note.txt")
    note.unlink()
    (tmp_path / "latest").symlink_to(begun)
    monkeypatch.chdir(begun)
    outcome = run_script("convert.py", weights, tmp_path / "latest", "--overwrite")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "latest").is_symlink() and Path("report.json").exists()
    assert views.faults(begun) == [] and steps_in(begun / "checkpoints") == [0]
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "latest", "run", weights.name}


# Which run owns the directory


def test_runs_that_begin_at_once_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(reserve(TrainConfig()))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8 and {path.parent.name for path in found} == {"runs"}


def test_the_other_processes_of_a_run_go_where_the_first_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = _open_directory(None, TrainConfig())
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "exchange", lambda value: [str(first.path), value])
    assert _open_directory(None, TrainConfig()).path == first.path
    assert list(Path("runs").iterdir()) == [first.path]
    first.close()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_a_lock_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "run.lock")
    with pytest.raises(InputError, match=r"run\.lock is no regular file"):
        RunDirectory(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    said = []
    monkeypatch.setattr(fcntl, "flock", no_locks)
    RunDirectory(tmp_path, say=said.append).close()
    assert len(said) == 1 and os.strerror(code) in said[0]


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "report.json", "SHA256SUMS"])
def test_a_folder_where_a_file_has_to_be_is_refused(begun, name):
    (begun / name).unlink(missing_ok=True)
    (begun / name).mkdir()
    before = tree(begun)
    with pytest.raises(InputError, match=f"{name} is a directory, not a file"):
        RunDirectory(begun, resume=True)
    assert tree(begun) == before


def test_checkpoints_that_are_no_folder_are_refused(begun):
    shutil.rmtree(begun / "checkpoints")
    (begun / "checkpoints").symlink_to("nowhere")
    with pytest.raises(InputError, match="checkpoints is not a directory"):
        RunDirectory(begun, resume=True)


def moved(path):
    path.rename(path.with_name("elsewhere"))


def emptied(path):
    shutil.rmtree(path)
    path.mkdir()


def replaced(path):
    moved(path)
    shutil.copytree(path.with_name("elsewhere"), path)


@pytest.mark.parametrize("fate", [moved, shutil.rmtree, emptied, replaced])
def test_a_run_ends_where_its_directory_is_gone(tmp_path, fate):
    """Every kind of write fails and does not create the directory again."""
    path = tmp_path / "run"
    directory = RunDirectory(path)
    directory.start_logs(None, 0)
    fate(path)
    before = tree(tmp_path)
    for touch in (
        lambda: directory.write_config(TrainConfig()),
        lambda: directory.log_step(1, {"loss": 1.0}),
        lambda: directory.log_epoch(1, {"epoch": 1}, {"epoch": 1}),
        lambda: directory.write_report({}),
    ):
        with pytest.raises(RunLost, match="moved, deleted or replaced"):
            touch()
    assert tree(tmp_path) == before
    directory.close()


def test_a_training_ends_where_its_directory_is_gone(tmp_path, monkeypatch, capsys):
    original = loop.finish_epoch

    def finish_epoch(run):
        if run.progress.epoch == 1:
            run.checkpoints.wait()
            moved(tmp_path / "run")
        original(run)

    monkeypatch.setattr(loop, "finish_epoch", finish_epoch)
    config = small(epochs="3", data={"train_images": "96"})
    with pytest.raises(SystemExit) as left:
        exits.run_command(lambda: fit(config, tmp_path / "run", display=quiet()) and 0)
    error = capsys.readouterr().err
    assert left.value.code == 1 and error.count("\n") == 1 and "moved, deleted" in error
    assert not (tmp_path / "run").exists()
    assert len(tables.read_rows(tmp_path / "elsewhere" / "metrics.csv")) == 1
