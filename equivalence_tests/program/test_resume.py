"""A resumed run needs its own data and checkpoints, and no other files."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.image_folder import fill
from equivalence_tests.program.test_train import cut_at, digest, quiet, small
from flax_resnet.data.prepare import check_contents, contents
from flax_resnet.data.sources import open_dataset
from flax_resnet.devices import distributed
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.runs import checkpoint, views
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.tables import read_rows
from flax_resnet.runs.views import class_names, read_config
from flax_resnet.training import restore, selection
from flax_resnet.training.fit import fit
from flax_resnet.training.progress import Interrupted


def cut(config, run_dir, monkeypatch, step=7):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        cut_at(step, patch)
        fit(config, run_dir, display=quiet())


def test_the_time_before_a_cut_counts(tmp_path, monkeypatch):
    """The row of an interrupted epoch has all its steps and seconds."""
    config = small(epochs="2")
    cut(config, tmp_path, monkeypatch)
    document = restore.restore(tmp_path, Checkpoints.latest)[0]
    before = document["progress"]["seconds"]
    assert before > 0
    fit(config, tmp_path, resume=True, display=quiet())
    first, last = read_rows(tmp_path / "timings.csv")
    assert first["seconds"] > before and first["steps"] == last["steps"] == 20


def test_a_finished_run_can_be_stopped_at_its_evaluation(tmp_path, monkeypatch):
    """Such a run has no epoch in progress to be timed."""
    fit(small(epochs="1"), tmp_path, display=quiet())
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(distributed, "agreed_signal", lambda _: signal.SIGTERM)
        fit(small(epochs="1"), tmp_path, resume=True, display=quiet())
    assert fit(small(epochs="1"), tmp_path, resume=True, display=quiet())["epochs"] == 1


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A folder of images and the config of an interrupted run on it."""
    for name in ("cat", "dog"):
        fill(tmp_path / "data" / name, 20)
    data = {"dataset": f"folder:{tmp_path / 'data'}", "image_size": "8"}
    config = small(epochs="2", batch_size="8", data=data)
    cut(config, tmp_path / "run", monkeypatch, step=2)
    return config


def renamed(data):
    (data / "dog").rename(data / "bird")


def grown(data):
    shutil.copy(data / "dog" / "00.png", data / "dog" / "99.png")


def repainted(data):
    """Other images of the same names and labels."""
    for path in data.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


@pytest.mark.parametrize("change, words", [
    (renamed, "classes: cat, dog, now bird, cat"), (grown, "train images: "),
    (repainted, "train files: "),
])  # fmt: skip
def test_other_data_is_refused(begun, tmp_path, change, words):
    """Otherwise labels could be swapped, or training images be held out."""
    kept = steps_in(tmp_path / "run" / "checkpoints")
    change(tmp_path / "data")
    with pytest.raises(InputError, match=words):
        fit(begun, tmp_path / "run", resume=True, display=quiet())
    assert steps_in(tmp_path / "run" / "checkpoints") == kept
    if change is not renamed:  # other classes have their own message
        refused(run_script("evaluate.py", tmp_path / "run"), words)


def test_a_run_of_an_earlier_version_has_names_as_the_disk_has_them(begun, tmp_path):
    """Some file systems store an accent as a separate character."""
    (tmp_path / "data" / "dog").rename(tmp_path / "data" / "d\u00f6g")
    [step] = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    text = (step / "document" / "metadata").read_text()
    (step / "document" / "metadata").write_text(text.replace("dog", r"do\u0308g"))
    checkpoint._write_manifest(step)
    run = load_run(tmp_path / "run")
    assert run.class_names == class_names(tmp_path / "run") == ("cat", "d\u00f6g")
    assert "o\u0308" in run.contents["classes"]
    check_contents(contents(open_dataset(begun.data)), run.contents)
    with pytest.raises(InputError, match="classes"):
        check_contents({"classes": "cat, dog"}, run.contents)


@pytest.mark.control
def test_the_same_data_elsewhere_is_the_same(tmp_path, begun):
    (tmp_path / "data").rename(tmp_path / "moved")
    flags = ["--resume", "--run-dir", tmp_path / "run", "--dataset", f"folder:{tmp_path / 'moved'}"]
    outcome = run_script("train.py", *flags)
    assert outcome.status == 0, outcome.err
    assert read_config(tmp_path / "run").data.dataset == f"folder:{tmp_path / 'moved'}"


def test_a_fine_tuned_run_needs_its_source_no_more(tmp_path, monkeypatch):
    fit(small(epochs="1"), tmp_path / "source", display=quiet())
    config = small(epochs="1", init_from=str(tmp_path / "source"))
    fit(config, tmp_path / "straight", display=quiet())
    cut(config, tmp_path / "cut", monkeypatch)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    fit(config, tmp_path / "cut", resume=True, display=quiet())
    assert digest(tmp_path / "cut") == digest(tmp_path / "straight")
    (tmp_path / "cut" / "report.json").unlink()
    for step in steps_in(tmp_path / "cut" / "checkpoints"):
        (tmp_path / "cut" / "checkpoints" / str(step) / "manifest.json").unlink()
    with pytest.raises(InputError, match="none of its checkpoints is sound"):
        fit(config, tmp_path / "cut", resume=True, display=quiet())


def test_a_source_does_not_switch_the_compilation_cache_on(tmp_path):
    fit(small(epochs="1"), tmp_path, display=quiet())
    before = jax.config.jax_compilation_cache_dir
    assert before is not None
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        restore.load_weights(tmp_path)
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_report_names_the_epoch_that_was_evaluated(tmp_path, monkeypatch):
    """If the best checkpoint is damaged, the newest is evaluated."""
    monkeypatch.setattr(selection, "improves", lambda value, before, *_: before is None)
    report = fit(small(epochs="3"), tmp_path, display=quiet())
    assert report["best_epoch"] == report["evaluated_epoch"] == 1
    (tmp_path / "checkpoints" / "20" / "manifest.json").unlink()
    report = fit(small(epochs="3"), tmp_path, resume=True, display=quiet())
    assert report["best_epoch"] == 1 and report["evaluated_epoch"] == 3


@pytest.mark.parametrize("left", ["", "{"])
def test_a_run_that_died_in_its_first_second_begins_again(tmp_path, left):
    """Such a run has left its lock, and no config.json or half of one."""
    (tmp_path / "run.lock").write_text("1")
    if left:
        (tmp_path / "config.tmp").write_text(left)
    assert fit(small(epochs="1"), tmp_path, resume=True, display=quiet())["epochs"] == 1


def test_the_config_is_there_before_the_checkpoints(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flax_resnet.training.fit.Checkpoints", killed)
        fit(small(epochs="1"), tmp_path / "run", display=quiet())
    assert fit(small(epochs="1"), tmp_path / "run", resume=True, display=quiet())["epochs"] == 1


def test_a_stop_at_the_last_step_of_all_leaves_a_whole_run(tmp_path, monkeypatch):
    """Its validation, which is no improvement, comes after the checkpoint of that step."""
    config = small(epochs="1", data={"validation_fraction": 0})
    fit(config, tmp_path / "whole", display=quiet())
    [last] = steps_in(tmp_path / "whole/checkpoints")
    cut(config, tmp_path / "run", monkeypatch, step=last)
    fit(config, tmp_path / "run", resume=True, display=quiet())
    assert views.faults(tmp_path / "run") == [] and views.is_trained(tmp_path / "run")


def test_other_class_weights_are_other_data(tmp_path, monkeypatch):
    """The config holds the name of their file alone."""
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({str(digit): 1 for digit in range(10)}))
    config = small(epochs="1", optimizer={"class_weights": str(file)})
    cut(config, tmp_path / "run", monkeypatch)
    file.write_text(json.dumps({str(digit): 1 + digit for digit in range(10)}))
    with pytest.raises(InputError, match="the data have changed since the run began: class we"):
        fit(config, tmp_path / "run", resume=True, display=quiet())


def test_a_run_is_where_its_data_were_last(tmp_path, monkeypatch):
    """The best checkpoint may be older than the place that a resumed run was given."""
    fit(small(epochs="2"), tmp_path, display=quiet())
    first, last = steps_in(tmp_path / "checkpoints")
    original = Checkpoints.document

    def document(self, step):
        found = original(self, step)
        data = found["config"]["data"] | {"dataset": f"folder:{step}"}
        return found | {"config": found["config"] | {"data": data}}

    monkeypatch.setattr(Checkpoints, "document", document)
    config = restore.restore(tmp_path, lambda checkpoints: first)[1]
    assert config.data.dataset == f"folder:{last}"
