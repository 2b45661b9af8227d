"""The twin goes on with a run that was cut off as if there had been no break."""

import dataclasses
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from equivalence_tests.program.insects import write_folder
from equivalence_tests.program.twin import call, small
from flax_resnet.commands import cli
from flax_resnet.errors import InputError
from torch_ref import checkpoint, directory, loop, prepare, resume
from torch_ref.guard import NonFiniteLoss
from torch_ref.train import fit

FILES = ["metrics.csv", "report.json", "run.lock", "state.pth", "weights.pth"]
RUNS = {
    "the_average_and_mixup": {
        "augment": {"mixup": 0.2},
        "optimizer": {"ema_decay": 0.5},
        "model": {"dropout": 0.3},
    },
    "accumulation across epochs": {"optimizer": {"accumulate_steps": 3}},
    "onecycle": {"schedule": {"schedule": "onecycle", "cycle_momentum": True}},
    "cosine_each_epoch": {
        "optimizer": {"optimizer": "adam"},
        "schedule": {"schedule": "cosine", "schedule_per": "epoch", "warmup_epochs": 1},
    },
    "timms_policy": {"augment": {"auto_augment": "rand-m7-mstd0.5"}},
    "plateau": {
        "optimizer": {"optimizer": "rmsprop"},
        "schedule": {"schedule": "plateau", "plateau_patience": 0},
        "early_stopping": {"patience": 3, "min_delta": 0.5, "monitor": "validation_accuracy"},
    },
}


def config(**changes):
    return cli.merge(small(epochs=5), changes)


def results(run_dir):
    return (run_dir / "metrics.csv").read_text(), checkpoint.load(run_dir / "weights.pth")


def train_until(epoch, settings, run_dir):
    """A run that is killed once the state of an epoch is saved."""

    def save(run, place):
        resume.save_state(run, place)
        if run.epoch == epoch:
            raise KeyboardInterrupt

    with mock.patch.object(loop, "save_state", save), pytest.raises(KeyboardInterrupt):
        fit(settings, run_dir)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    place = tmp_path_factory.mktemp("begun") / "run"
    train_until(2, config(), place)
    return place


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_one_without_a_break(name, tmp_path):
    if name == "timms_policy":
        pytest.importorskip("timm")
    settings = config(**RUNS[name])
    whole = fit(settings, tmp_path / "whole")
    for epoch in (1, 2):
        train_until(epoch, settings, tmp_path / f"cut-{epoch}")
        report = fit(settings, tmp_path / f"cut-{epoch}", resume=True)
        assert report["splits"] == whole["splits"] and report["epochs"] == whole["epochs"]
        lines, weights = results(tmp_path / f"cut-{epoch}")
        expected_lines, expected = results(tmp_path / "whole")
        assert lines == expected_lines
        for key, array in expected.items():
            np.testing.assert_array_equal(weights[key], array, err_msg=key)


@pytest.mark.parametrize("lost", ["optimizer", "scheduler", "random"])
def test_without_a_part_of_the_state_it_takes_other_steps(lost, tmp_path, begun):
    """Negative control: each part matters."""
    settings = config()
    fit(settings, tmp_path / "whole")
    shutil.copytree(begun, tmp_path / "cut")
    load = resume.load_content

    def damaged(path):
        fresh = load(path)
        if lost == "optimizer":
            fresh["optimizer"]["state"] = {}
        if lost == "scheduler":
            fresh["scheduler"]["last_epoch"] = 0
        if lost == "random":
            fresh["random"][1] = torch.Generator().manual_seed(5).get_state()
        return fresh

    with mock.patch.object(resume, "load_content", damaged):
        fit(settings, tmp_path / "cut", resume=True)
    assert results(tmp_path / "cut")[0] != results(tmp_path / "whole")[0]


def test_a_run_that_was_never_begun_begins_and_a_finished_one_stays(tmp_path, capsys):
    flags = ["--arch", "resnet20", "--smoke", "--run-dir", tmp_path / "run", "--resume"]
    assert call(*flags) == 0
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "run").iterdir()}
    assert call(*flags) == 0
    assert {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()} == before
    assert call(*flags, "--lr", "0.5") == 2
    message = capsys.readouterr().err
    assert "was begun with other flags: optimizer.lr 0.5 (the run has" in message
    moved = config(data={"dataset": "folder:elsewhere"})
    run, begun = mock.Mock(config=moved), config()
    with pytest.raises(InputError, match="data.dataset 'folder:elsewhere' .the run has 'digits'"):
        resume._check_settings(run, tmp_path, begun)


def test_a_run_cut_off_in_its_first_epoch_begins_anew(tmp_path):
    with mock.patch.object(loop, "save_state", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            fit(config(), tmp_path / "run")
    (tmp_path / "run" / "state.tmp").write_bytes(b"cut off")
    report = fit(config(), tmp_path / "run", resume=True)
    assert report["epochs"] == 5
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == FILES
    assert results(tmp_path / "run")[0].count("\n") == 6


def test_what_is_no_run_or_damaged_is_refused(tmp_path, begun, capsys):
    assert call("--resume") == 2
    assert "--resume needs --run-dir" in capsys.readouterr().err
    place = tmp_path / "cut"
    shutil.copytree(begun, place)
    (place / "thesis.txt").touch()
    with pytest.raises(InputError, match="holds thesis.txt, which no run has written"):
        fit(config(), place, resume=True)
    (place / "thesis.txt").unlink()
    state = (place / "state.pth").read_bytes()
    (place / "state.pth").write_bytes(state[:-100])
    with pytest.raises(InputError, match="state.pth: damaged"):
        fit(config(), place, resume=True)
    checkpoint.save(place / "state.pth", {"weight": np.zeros(3)})
    with pytest.raises(InputError, match="not the state of this run"):
        fit(config(), place, resume=True)
    (place / "state.pth").unlink()
    (place / "report.json").write_text("{}")
    with pytest.raises(InputError, match="has no state.pth to go on from"):
        fit(config(), place, resume=True)
    (tmp_path / "link").symlink_to(begun)
    with pytest.raises(InputError, match="is no directory of a run"):
        fit(config(), tmp_path / "link", resume=True)


def test_a_run_in_use_is_refused(tmp_path, begun):
    shutil.copytree(begun, tmp_path / "run")
    with directory.locked(tmp_path / "run", resume=True):
        with pytest.raises(InputError, match="is in use by a running process"):
            fit(config(), tmp_path / "run", resume=True)
    with directory.locked(tmp_path / "new"):
        for resume_it, words in (False, "exists already"), (True, "is in use"):
            with pytest.raises(InputError, match=words):
                with directory.locked(tmp_path / "new", resume=resume_it):
                    pass
        assert (tmp_path / "new").exists()
    assert not (tmp_path / "new").exists()  # nothing was written
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), directory.locked(tmp_path / "file" / "run"):
        pass


def test_the_first_weights_are_not_needed_again(tmp_path, begun):
    shutil.copytree(begun, tmp_path / "source")
    fit(config(), tmp_path / "source", resume=True)
    settings = config(init_from=str(tmp_path / "source"))
    train_until(1, settings, tmp_path / "run")
    shutil.rmtree(tmp_path / "source")
    assert fit(settings, tmp_path / "run", resume=True)["epochs"] == 5


def test_a_run_among_its_images_is_refused(tmp_path):
    data = write_folder(tmp_path / "data", splits=(".",), per_class=20)
    with pytest.raises(InputError, match="the folder of the images"):
        fit(config(data={"dataset": f"folder:{data}"}), data / "run")
    assert not (data / "run").exists()


@pytest.mark.parametrize("images, group", [(1, None), (4, 1)])
def test_batches_of_one_value_a_channel_are_refused(tmp_path, images, group):
    """ResNet-18 leaves one pixel of an image of 16."""
    model = {"arch": "resnet18", "batch_norm_images": group}
    alone = config(batch_size=images, model=model, data={"image_size": 16})
    words = f"`batch_size` {images}, `image_size` 16: Expected more than 1"
    with pytest.raises(InputError, match=words):
        fit(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_result_that_is_not_finite_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_ref.report.evaluate", lambda *rest: {"loss": float("nan")})
    with pytest.raises(NonFiniteLoss, match="the train loss of the chosen weights is nan"):
        fit(config(epochs=1), tmp_path / "run")
    assert not (tmp_path / "run" / "report.json").exists()


def test_data_may_be_read_in_another_way(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "cut")
    settings = dataclasses.replace(config(data={"num_workers": 1}), eval_batch_size=7)
    assert fit(settings, tmp_path / "cut", resume=True)["epochs"] == 5


def test_changed_data_are_refused(tmp_path):
    data = write_folder(tmp_path / "data", splits=(".",), per_class=20)
    settings = config(
        data={"dataset": f"folder:{data}", "mean": (0.5,) * 3, "std": (0.2,) * 3},
        batch_size=8, epochs=2,
    )  # fmt: skip
    train_until(1, settings, tmp_path / "run")
    path = data / "ant" / "00.png"
    content = path.read_bytes()
    path.write_bytes((data / "bee" / "00.png").read_bytes())  # another image of the same name
    with pytest.raises(InputError, match="the data have changed"):
        fit(settings, tmp_path / "run", resume=True)
    path.write_bytes(content)
    (data / "ant").rename(data / "cat")  # after the bee
    with pytest.raises(InputError, match="the data have changed"):
        fit(settings, tmp_path / "run", resume=True)


def test_images_are_cropped_at_the_size_of_the_training():
    settings = config(
        data={"image_size": 24, "train_size": 16},
        augment={"random_resized_crop": True, "random_crop": 2},
    )
    shape = prepare.prepare(settings).augmented[0][0].shape
    assert shape == (1, 16, 16)
