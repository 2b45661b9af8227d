"""Run directories: rules for writing and deleting, and checks of their content."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import threading
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.test_train import digest, quiet, small
from equivalence_tests.studies import flips
from flax_resnet.commands import cli
from flax_resnet.config import TrainConfig, config_from_file, to_dict
from flax_resnet.devices import distributed
from flax_resnet.devices.distributed import RunLost
from flax_resnet.errors import InputError
from flax_resnet.interop import export
from flax_resnet.models import create_model
from flax_resnet.runs import owned, tables, views
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.directory import RunDirectory, as_json, reserve
from flax_resnet.training import loop
from flax_resnet.training.fit import _open_directory, fit
from flax_resnet.weights import convert

HUGGING_FACE = '{"model_type": "bert", "hidden_size": 768}'


def tree(folder: Path) -> dict:
    """{path: content} of everything below; the content of a link is its target."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def without_training(run_dir: Path) -> Path:
    """The directory of a run that was cut off after one epoch."""
    directory = RunDirectory(run_dir)
    directory.write_config(TrainConfig())
    directory.start_logs(None, 0)
    directory.log_epoch(5, {"epoch": 1, "loss": 0.5}, {"epoch": 1, "seconds": 2.5})
    document = {
        "config": to_dict(TrainConfig()),
        "progress": {"epoch": 1},
        "tables": directory.marks(),
    }
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(5, {"a": jnp.arange(9.0)}, document, improvement=False)
    checkpoints.close()
    directory.close()
    return run_dir


@pytest.fixture
def begun(tmp_path):
    return without_training(tmp_path / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of two epochs."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    fit(small(epochs="2", data={"train_images": "96"}), run_dir, display=quiet())
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


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


def test_all_that_a_run_writes_is_its_own(finished, copy):
    """Remains of a run that was killed during a save are its own too."""
    assert owned.foreign(finished) == []
    for name in (
        "checkpoints/9.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/ocdbt.process_0/d",
        "checkpoints/9.orbax-checkpoint-tmp-17/document.orbax-checkpoint-tmp-18/metadata",
        "checkpoints/6/manifest.json.tmp",
        "metrics.tmp",
    ):
        write(copy / name)
    RunDirectory(copy, overwrite=True).close()
    assert tree(copy).keys() == {"run.lock"}


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
        cli.run_command(lambda: fit(config, tmp_path / "run", display=quiet()) and 0)
    error = capsys.readouterr().err
    assert left.value.code == 1 and error.count("\n") == 1 and "moved, deleted" in error
    assert not (tmp_path / "run").exists()
    assert len(tables.read_rows(tmp_path / "elsewhere" / "metrics.csv")) == 1


# Which files are trusted


def test_a_cut_off_run_comes_back_whatever_happened_to_its_files(finished, copy):
    """An edited setting, a truncated row and a deleted table are named and restored.

    They are restored from the checkpoint, and the run ends as the uninterrupted one.
    """
    flips.unfinished(copy)
    values = json.loads((copy / "config.json").read_text())
    values["optimizer"]["lr"] *= 10
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "metrics.csv").write_bytes((copy / "metrics.csv").read_bytes()[:150])
    (copy / "timings.csv").unlink()
    outcome = run_script("train.py", "--resume", "--run-dir", copy)
    assert outcome.status == 0, outcome.err
    for words in (
        "config.json says optimizer.lr 0.03 (the run has 0.003)",
        "metrics.csv is not as the run wrote it; it is written anew",
        "timings.csv is missing; it is written anew",
    ):
        assert outcome.out.count(words) == 1, outcome.out
    assert digest(copy) == digest(finished)
    for name in ("metrics.csv", "config.json", "per_class.csv"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes(), name
    assert len(tables.read_rows(copy / "timings.csv")) == 2
    assert views.faults(copy) == []


def test_a_damaged_report_is_written_again(finished, copy):
    """If nothing is damaged, nothing is written."""
    text = (copy / "report.json").read_text()
    (copy / "report.json").write_text(text.replace('"epochs": 2', '"epochs": 3'))
    outcome = run_script("train.py", "--resume", "--run-dir", copy)
    assert outcome.status == 0 and "report.json is not as the run wrote it" in outcome.out
    again = json.loads((copy / "report.json").read_text())
    assert again["epochs"] == 2 and again["splits"] == json.loads(text)["splits"]
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "nothing to do" in run_script("train.py", "--resume", "--run-dir", copy).out
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*")}


def test_a_report_is_not_believed_because_its_digest_is_gone(copy):
    (copy / "SHA256SUMS").unlink()
    assert views.faults(copy) == [f"{copy / 'SHA256SUMS'} is missing"]


def test_a_damaged_checkpoint_of_a_finished_run_is_named_and_the_report_stays(copy):
    step = steps_in(copy / "checkpoints")[0]
    (copy / "checkpoints" / str(step) / "manifest.json").write_text("null")
    before = tree(copy)
    outcome = run_script("train.py", "--resume", "--run-dir", copy)
    assert outcome.status == 0 and f"checkpoint of step {step}: its manifest" in outcome.out
    assert tree(copy) == before


def test_a_finished_run_without_a_sound_checkpoint_is_refused(copy):
    for step in steps_in(copy / "checkpoints"):
        shutil.move(copy / f"checkpoints/{step}", copy / f"checkpoints/0{step}")
    before = tree(copy)
    outcome = run_script("train.py", "--resume", "--run-dir", copy)
    refused(outcome, "is finished and has no sound checkpoint", "06 passed over")
    assert tree(copy) == before


def test_a_run_that_begins_again_says_so(copy):
    (copy / "report.json").unlink()
    for step in steps_in(copy / "checkpoints"):
        shutil.rmtree(copy / f"checkpoints/{step}")
    display = quiet()
    with mock.patch.object(display, "say") as say:
        fit(small(), copy, resume=True, display=display)
    assert any("metrics.csv: the run begins again" in line for (line,), _ in say.call_args_list)


def test_other_commands_take_the_config_of_the_checkpoint(copy, finished, tmp_path):
    values = json.loads((copy / "config.json").read_text())
    values["data"]["mean"], values["early_stopping"]["restore_best"] = [0.9], False
    (copy / "config.json").write_text(json.dumps(values))
    outcome = run_script("evaluate.py", copy, "--json", tmp_path / "figures.json")
    assert outcome.status == 0 and "data.mean [0.9] (the run has [0." in outcome.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    report = json.loads((finished / "report.json").read_text())
    assert figures["accuracy"] == report["splits"]["test"]["accuracy"]
    (copy / "config.json").unlink()
    outcome = run_script("convert.py", copy, tmp_path / "again")
    assert outcome.status == 0 and "config.json does not exist" in outcome.err
    assert views.read_config(tmp_path / "again") == views.read_config(finished)


def test_the_order_of_the_classes_is_that_of_the_checkpoint(finished, tmp_path):
    assert views.class_names(finished) == tuple("0123456789")
    assert views.class_names(tmp_path) == ()


def test_without_a_checkpoint_a_changed_config_is_refused(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_config(TrainConfig())
    directory.close()
    assert views.read_config(tmp_path) == TrainConfig()
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.04', '"lr": 0.05'))
    with pytest.raises(InputError, match="not as the run wrote it, and there is no checkpoint"):
        views.read_config(tmp_path)


def test_a_config_that_is_a_pipe_is_not_waited_for(begun):
    (begun / "config.json").unlink()
    os.mkfifo(begun / "config.json")
    assert any("config.json is no file" in fault for fault in views.faults(begun))


def test_the_digests_are_those_of_sha256sum(finished):
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=finished, check=True, stdout=-3)


@pytest.mark.parametrize("copies", [(0,), (1,)])
def test_a_table_comes_back_from_either_copy(tmp_path, copies):
    paths = (tmp_path / "a.csv", tmp_path / "b.csv")
    table = tables.Table(*paths)
    table.start(b"")
    for epoch in (1, 2, 3):
        table.append({"epoch": epoch, "loss": 0.5 / epoch})
    mark, whole = table.mark(), paths[0].read_bytes()
    table.append({"epoch": 4, "loss": 0.0})
    for number in copies:
        with paths[number].open("r+b") as file:
            file.truncate(20)
    again = tables.Table(*paths)
    again.start(again.recover(mark))
    assert [path.read_bytes() for path in paths] == [whole, whole]
    again.append({"epoch": 4, "loss": 0.0})
    assert again.rows()[3] == {"epoch": 4, "loss": 0.0}
    assert again.mark() == table.mark()
    for path in paths:
        path.unlink()
    assert again.recover(mark) is None


def test_rows_are_appended(tmp_path, monkeypatch):
    """The cost of a row does not grow: nothing is read or replaced."""
    table = tables.Table(tmp_path / "a.csv", tmp_path / "b.csv")
    table.start(b"")
    for refused_call in ("write", "read"):
        monkeypatch.setattr(tables, refused_call, None)
    for epoch in range(3):
        table.append({"epoch": epoch, "loss": 0.1})
    sha = hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest()
    assert table.mark() == {"bytes": 29, "sha256": sha}
    assert len(json.dumps(table.mark())) < 120


def test_rows_lost_in_both_copies_are_said(begun):
    for folder in (begun, begun / "checkpoints"):
        (folder / "metrics.csv").write_bytes(b"epoch,loss\n1,0.6\n")
    said = []
    document = Checkpoints(begun / "checkpoints").document(5)
    directory = RunDirectory(begun, resume=True, say=said.append)
    directory.start_logs(document, 5)
    assert directory.rows() == [] and directory.timings() == [{"epoch": 1, "seconds": 2.5}]
    assert said == [f"{begun}/metrics.csv: both copies are damaged; its rows so far are lost"]
    directory.close()


@pytest.mark.parametrize("content, rows, words", [
    (b"epoch,loss\n1,0.5\n2,0.25\n", [{"epoch": 1, "loss": 0.5}], []),
    (b"epoch,loss\n1,0.5\n2,0.", [{"epoch": 1, "loss": 0.5}], []),
    (b"epoch,loss\n1,0.5\n2", [], ["metrics.csv", "lost"]),
    (b"epoch,lo\xffs\n1,0.5\n", [], ["metrics.csv", "lost"]),
    (b"epoch,loss\n1,0.5,7\n", [], ["metrics.csv", "lost"]),
    (b"apoch,loss\n1,0.5\n", [], ["metrics.csv", "lost"]),
    (b"epoch,loss\n\xc2\xb2,0.5\n", [], ["metrics.csv", "lost"]),
])  # fmt: skip
def test_a_run_of_an_earlier_version_keeps_the_rows_of_its_file(begun, content, rows, words):
    """Checkpoints of earlier versions contain no tables."""
    (begun / "metrics.csv").write_bytes(content)
    said = []
    directory = RunDirectory(begun, resume=True, say=said.append)
    directory.start_logs({"progress": {"epoch": 1}}, 5)
    assert directory.rows() == rows
    assert len(said) == bool(words) and all(word in said[0] for word in words)
    directory.close()


def test_json_holds_no_nan():
    report = {"loss": math.nan, "splits": [{"f1": -math.inf, "accuracy": 0.5}]}
    assert json.loads(as_json(report)) == {"loss": None, "splits": [{"f1": None, "accuracy": 0.5}]}


@pytest.mark.parametrize("cut", [False, True], ids=["finished", "unfinished"])
def test_a_flipped_bit_is_harmless_or_named(copy, cut):
    """The bit is in any file; `python -m equivalence_tests.studies.flips` is the long version."""
    if cut:
        flips.unfinished(copy)
    counts, rows = flips.study(copy, 60, seed=int(cut))
    assert counts["silent"] == counts["traceback"] == 0, rows
    assert counts["named"] > 25
    harmless = ("run.lock", "events.out", "config.json", "manifest.json")
    allowed = harmless + (("metrics.csv", "timings.csv", "SHA256SUMS") if cut else ())
    assert all(any(name in row for name in allowed) for row in rows), rows


@pytest.mark.control
def test_the_study_of_flips_sees_a_config_that_is_believed(copy, monkeypatch):
    flips.unfinished(copy)
    whole, _ = flips.reading(copy)
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"lr": 0.003', '"lr": 0.002'))
    assert flips.verdict(copy, whole) == "named"
    believed = lambda run_dir, say: config_from_file(Path(run_dir) / "config.json")  # noqa
    monkeypatch.setattr(views, "read_config", believed)
    assert flips.verdict(copy, whole) == "silent"
