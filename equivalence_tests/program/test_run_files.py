"""Files of a run: damage is named, and what a checkpoint holds is written again."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.run_directory import tree, write
from equivalence_tests.program.test_train import digest, quiet, small
from equivalence_tests.studies import flips
from flax_resnet.config import TrainConfig, config_from_file
from flax_resnet.errors import InputError
from flax_resnet.runs import owned, tables, views
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.directory import RunDirectory, as_json
from flax_resnet.training.fit import fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run of two epochs."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    fit(small(epochs="2", data={"train_images": "96"}), run_dir, display=quiet())
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


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
