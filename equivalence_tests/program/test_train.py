"""Training: written files, repetition, resuming and reports."""

import csv
import hashlib
import json
import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console

from equivalence_tests.program.command import run_script, train
from flax_resnet.commands import cli
from flax_resnet.config import TrainConfig, config_from_file, from_dict
from flax_resnet.errors import InputError
from flax_resnet.interop import export, training_state
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.models import create_model
from flax_resnet.runs import plots
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.directory import reserve
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import read_config
from flax_resnet.training import loop, steps
from flax_resnet.training.fit import fit
from flax_resnet.training.network import Variables
from flax_resnet.training.progress import Interrupted, Progress
from flax_resnet.training.restore import restore
from flax_resnet.weights import convert

SMALL = {
    "epochs": "3",
    "batch_size": "32",
    "model": {"arch": "basic_cnn"},
    "data": {"train_images": "640"},
    "optimizer": {"optimizer": "adam", "lr": ".003"},
    "parallel": {"devices": "1"},
}


def small(**changes) -> TrainConfig:
    return cli.merge(cli.merge(TrainConfig(), SMALL), changes)


def quiet() -> Display:
    return Display(Console(quiet=True))


def weights(run_dir) -> dict:
    run = load_run(run_dir)
    return convert.state_dict(run.network.to_model(run.variables))


def digest(run_dir) -> str:
    """SHA-256 of the evaluated weights."""
    sha = hashlib.sha256()
    for name, value in weights(run_dir).items():
        sha.update(name.encode() + value.tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three epochs by the command: its directory and its output."""
    run_dir = tmp_path_factory.mktemp("train") / "run"
    outcome = train(run_dir, "--epochs", 3, "--seed", 1)
    assert outcome.status == 0, outcome.err
    return run_dir, outcome


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[0] / "report.json").read_text())


def test_three_epochs_learn_the_digits(report):
    """Three epochs of 640 images: chance is 0.1."""
    assert report["splits"]["test"]["accuracy"] > 0.5


def test_the_command_prints_every_result(finished):
    out = finished[1].out
    for word in (
        "parameters",
        "MFLOPs",
        "640 training",
        "epoch   3/3",
        "images/s",
        "precision",
        "F1",
    ):
        assert word in out


def test_report_has_the_public_fields(report):
    assert set(report["splits"]) == {"train", "validation", "test"}
    for split in report["splits"].values():
        for name in ("loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro"):
            assert math.isfinite(split[name])
        assert 0 <= split["f1_macro"] <= 1
    assert report["epochs"] == 3 and report["stopped_early"] is False
    assert 1 <= report["best_epoch"] <= 3
    assert report["seconds"] > 0 and report["images_per_second"] > 0
    assert 0 <= report["data_wait_share"] < 1
    assert "scripts/train.py --run-dir" in report["command"]
    for name in ("jax", "flax", "device", "num_devices", "revision"):
        assert report["environment"][name]


def test_metrics_are_numbers_without_times(finished):
    rows = list(csv.DictReader((finished[0] / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert not any("second" in name or "time" in name for name in rows[0])
    assert "seconds" in (finished[0] / "timings.csv").read_text()


def test_per_class_table_agrees_with_the_report(finished, report):
    rows = list(csv.DictReader((finished[0] / "per_class.csv").open()))
    assert [row["class"] for row in rows] == [str(n) for n in range(10)]
    assert sum(int(row["support"]) for row in rows) == 360
    f1 = np.mean([float(row["f1"]) for row in rows])
    assert f1 == pytest.approx(report["splits"]["test"]["f1_macro"], abs=1e-12)


def test_written_pictures_have_content(finished):
    for name in ("curves.png", "confusion_matrix.png", "reliability.png"):
        with Image.open(finished[0] / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_a_class_may_be_named_like_a_formula(tmp_path):
    plots.confusion_matrix(tmp_path / "matrix.png", np.eye(2, dtype=int), ("$50_$100", "$\\frac$"))
    with Image.open(tmp_path / "matrix.png") as image:
        image.verify()


def test_tensorboard_reads_the_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0]))
    events.Reload()
    losses = [event.value for event in events.Scalars("epoch/train_loss")]
    rows = list(csv.DictReader((finished[0] / "metrics.csv").open()))
    np.testing.assert_allclose(losses, [float(row["train_loss"]) for row in rows], rtol=1e-6)


def test_config_reloads_and_repeats_the_run(finished, tmp_path):
    config = read_config(finished[0])
    assert config.data.mean and config.data.image_size == 8 and config.model.num_classes == 10
    outcome = run_script(
        "train.py", "--config", finished[0] / "config.json", "--run-dir", tmp_path / "again"
    )
    assert outcome.status == 0
    assert read_config(tmp_path / "again") == config
    assert digest(tmp_path / "again") == digest(finished[0])
    for name in ("metrics.csv", "per_class.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_another_seed_gives_other_weights(finished, tmp_path):
    fit(small(seed="2"), tmp_path / "run", display=quiet())
    assert digest(tmp_path / "run") != digest(finished[0])


def test_resuming_a_finished_run_changes_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}
    outcome = run_script("train.py", "--resume", "--run-dir", finished[0])
    assert outcome.status == 0 and "finished" in outcome.out
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}


def test_resuming_nothing_starts_from_the_beginning(tmp_path):
    assert train(tmp_path / "run", "--resume", "--epochs", 1).status == 0
    assert (tmp_path / "run" / "report.json").exists()


EVERYTHING = {
    "augment": {"random_crop": "1", "rotation": "10", "brightness": ".2", "mixup": ".2"},
    "optimizer": {"accumulate_steps": "2", "ema_decay": ".9", "clip_norm": "1", "l1": "1e-6"},
    "schedule": {"schedule": "plateau", "plateau_patience": "0", "warmup_epochs": "1"},
    "early_stopping": {"patience": "2", "monitor": "validation_loss"},
    "model": {"arch": "basic_cnn", "dropout": ".3"},
}


def cut_at(step, monkeypatch):
    """Make the next trainings stop at this step."""
    original = loop.at_log_step

    def at_log_step(run, count):
        if run.global_step == step:
            run.signum = 15
        return original(run, count)

    monkeypatch.setattr(loop, "at_log_step", at_log_step)


@pytest.mark.parametrize("cache", ["none", pytest.param("device", marks=pytest.mark.slow)])
def test_a_run_cut_off_at_any_step_ends_the_same(tmp_path, monkeypatch, cache):
    """The cuts are within an epoch and at its last step; all random and stateful parts are used."""
    config = small(**EVERYTHING, data={"train_images": "640", "cache": cache})
    fit(config, tmp_path / "straight", display=quiet())
    for step in (7, 20, 45):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            cut_at(step, patch)
            fit(config, tmp_path / "cut", resume=step > 7, display=quiet())
    fit(config, tmp_path / "cut", resume=True, display=quiet())
    assert digest(tmp_path / "cut") == digest(tmp_path / "straight")
    for name in ("metrics.csv", "per_class.csv"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_run_cut_off_at_the_last_step_of_its_best_epoch_reports_that(tmp_path, monkeypatch):
    """The weights of that epoch are saved before their validation."""
    config = small(epochs="2")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        cut_at(40, patch)
        fit(config, tmp_path / "run", display=quiet())
    report = fit(config, tmp_path / "run", resume=True, display=quiet())
    first, last = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert float(last["validation_loss"]) < float(first["validation_loss"])
    assert report["evaluated_epoch"] == 2
    assert report["splits"]["validation"]["loss"] == float(last["validation_loss"])


def test_images_decoded_every_epoch_train_the_same_weights(tmp_path):
    mean_std = {"train_images": "640", "mean": ["0.3"], "std": ["0.4"]}
    for cache in ("device", "none"):
        config = small(data=mean_std | {"cache": cache})
        fit(config, tmp_path / cache, display=quiet())
    assert digest(tmp_path / "device") == digest(tmp_path / "none")


def assert_alike(one, two):
    """Asserts that the weights of two runs agree up to float32 rounding.

    Where a gradient is nearly 0, Adam turns rounding into steps of full size.
    """
    one, two = weights(one), weights(two)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=2e-3, atol=2e-4)


def test_several_steps_a_dispatch_are_the_same_steps(tmp_path):
    for count in ("1", "2"):
        config = small(parallel={"devices": "1", "steps_per_dispatch": count})
        fit(config, tmp_path / count, display=quiet())
    assert_alike(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("dataset, name", [
    ("digits", "digits"), ("folder:/data/birds_v2/", "birds_v2"), ("tfds:a/b-v2", "a-b-v2"),
    ("cifar10:/x/cifar-10-python.tar.gz", "cifar10"), ("folder:~nobody/a b", "a-b"),
    ("arrayrecord:/data/shards-256/train-*", "shards-256"), ("arrayrecord:/usr", "usr"),
])  # fmt: skip
def test_a_run_is_named_after_its_data(dataset, name, tmp_path, monkeypatch):
    """The directory is reserved while it is still empty."""
    monkeypatch.chdir(tmp_path)
    config = cli.merge(TrainConfig(), {"data": {"dataset": dataset}})
    assert reserve(config) == Path("runs") / f"resnet18-{name}"
    Path(f"runs/resnet18-{name}-2").symlink_to("nowhere")
    assert reserve(config).name == f"resnet18-{name}-3"


@pytest.mark.slow
def test_a_run_under_pmap_is_that_on_a_mesh(tmp_path, monkeypatch):
    """The run is cut off, resumed, and evaluated with its best checkpoint."""
    for kind in ("jit", "pmap"):
        config = small(epochs="2", parallel={"devices": "2", "parallel": kind})
        if kind == "pmap":
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                cut_at(25, patch)
                fit(config, tmp_path / kind, display=quiet())
        report = fit(config, tmp_path / kind, resume=True, display=quiet())
        assert report["evaluated_epoch"] == report["best_epoch"]
    assert_alike(tmp_path / "jit", tmp_path / "pmap")


def test_early_stopping_ends_the_run_and_restores_the_best(tmp_path):
    config = small(
        epochs="40",  # rounding decides when it stops: four seeds stopped after 3 to 14
        optimizer={"optimizer": "adam", "lr": "0.02", "label_smoothing": "0"},
        schedule={"schedule": "constant"},
        early_stopping={"patience": "2", "monitor": "validation_loss"},
    )
    report = fit(config, tmp_path / "run", display=quiet())
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    losses = [float(row["validation_loss"]) for row in rows]
    best = int(np.argmin(losses)) + 1
    assert report["best_epoch"] == report["evaluated_epoch"] == best
    assert report["splits"]["validation"]["loss"] == losses[best - 1]
    assert report["stopped_early"] and report["epochs"] == best + 2 == len(rows)


@pytest.mark.slow
def test_the_last_weights_are_served_where_the_best_are_not_restored(tmp_path):
    config = small(
        epochs="40",
        optimizer={"optimizer": "adam", "lr": "0.02", "label_smoothing": "0"},
        schedule={"schedule": "constant"},
        early_stopping={"patience": "2", "restore_best": False},
    )
    report = fit(config, tmp_path / "run", display=quiet())
    assert report["evaluated_epoch"] == report["epochs"] == report["best_epoch"] + 2
    served = jax.tree.leaves(load_run(tmp_path / "run").variables)
    for choose, same in ((Checkpoints.latest, True), (Checkpoints.best, False)):
        state = restore(tmp_path / "run", choose)[-1]
        stored = jax.tree.leaves(steps.evaluation_variables(state))
        assert same == all(map(np.array_equal, served, stored))


@pytest.mark.slow
def test_weights_of_a_wide_run_leave_the_types_alone(tmp_path):
    """A float32 run that starts from float64 weights stays float32, and the reverse."""
    for dtype in ("float64", "float32"):
        model = {"arch": "basic_cnn", "dtype": dtype}
        fit(small(epochs="1", model=model), tmp_path / dtype, display=quiet())
    for dtype, other in (("float64", "float32"), ("float32", "float64")):
        model = {"arch": "basic_cnn", "dtype": dtype}
        config = small(epochs="1", model=model, init_from=str(tmp_path / other))
        fit(config, tmp_path / f"{dtype}-tuned", display=quiet())
        assert {str(a.dtype) for a in weights(tmp_path / f"{dtype}-tuned").values()} == {dtype}


def test_fine_tuning_takes_the_backbone_and_a_new_head(finished, tmp_path):
    config = small(init_from=str(finished[0]), new_head=True, freeze_backbone=True, epochs="1")
    fit(config, tmp_path / "tuned", display=quiet())
    before, after = weights(finished[0]), weights(tmp_path / "tuned")
    for name in before:
        assert (before[name] == after[name]).all() == (not name.startswith("fc.")), name


def test_weights_of_a_run_that_divided_the_same_data_otherwise_are_told(finished, tmp_path):
    for number, said in ((0, False), (1, True)):
        config = small(init_from=str(finished[0]), epochs="1", data={"split_seed": number})
        console = Console(record=True, width=300)
        fit(config, tmp_path / str(number), display=Display(console))
        assert ("divided digits otherwise" in console.export_text()) == said


def test_steps_of_another_framework_are_not_timed():
    progress = Progress(converted_steps=15, counted_steps=5, seconds=2.0)
    run = mock.Mock(progress=progress, steps_per_epoch=20, config=small(batch_size=32))
    _, timing = loop._rows(run)
    assert (timing["steps"], timing["images_per_second"]) == (5, 80)


def test_frozen_batchnorm_keeps_its_statistics(tmp_path):
    fresh = convert.state_dict(create_model("resnet20", in_channels=1))
    export.write_safetensors(tmp_path / "fresh.safetensors", fresh)
    start = {"init_from": str(tmp_path / "fresh.safetensors"), "freeze_backbone": True}
    config = small(model={"arch": "resnet20"}, epochs="1", **start)
    fit(config, tmp_path / "run", display=quiet())
    statistics = {n: v for n, v in weights(tmp_path / "run").items() if "running_mean" in n}
    assert statistics and all((value == 0).all() for value in statistics.values())


def test_weights_and_average_move_together_after_a_batch_is_skipped():
    """Two batches make an update; the first is skipped, so the third completes the update."""
    config = small(optimizer={"accumulate_steps": "2", "ema_decay": ".9"}, skip_nonfinite="1")
    state = steps.make_state(Variables({"fc": {"bias": jnp.zeros(3)}}, {}, {}), config)
    moved = []
    for finite in (False, True, True, True, True):
        gradient = {"fc": {"bias": jnp.where(finite, jnp.arange(3.0), jnp.nan)}}
        new = steps.apply_gradients(state, gradient, {}, config, 0.1, None)
        new = steps._unless_finite(finite, new, state)
        pairs = ((state.params, new.params), (state.ema, new.ema))
        moved.append([bool((old["fc"]["bias"] != now["fc"]["bias"]).any()) for old, now in pairs])
        if len(moved) == 2:  # half of an update is accumulated
            with pytest.raises(InputError, match="between two updates"):
                training_state.training_arrays(new, config.optimizer)
        if len(moved) == 3:  # the first update copies the weights
            np.testing.assert_array_equal(new.ema["fc"]["bias"], new.params["fc"]["bias"])
        state = new
    assert moved == [[False] * 2, [False] * 2, [True] * 2, [False] * 2, [True] * 2]


def test_the_average_begins_with_the_first_update_that_is_not_skipped():
    config = small(optimizer={"ema_decay": ".9"}, skip_nonfinite="1")
    state = steps.make_state(Variables({"fc": {"bias": jnp.zeros(3)}}, {}, {}), config)
    for finite in (False, True):
        gradient = {"fc": {"bias": jnp.where(finite, jnp.ones(3), jnp.nan)}}
        new = steps.apply_gradients(state, gradient, {}, config, 0.1, None)
        state = steps._unless_finite(finite, new, state)
    assert (state.params["fc"]["bias"] < 0).all()
    np.testing.assert_array_equal(state.ema["fc"]["bias"], state.params["fc"]["bias"])


def test_float64_is_float64(tmp_path):
    config = small(model={"arch": "basic_cnn", "dtype": "float64"}, epochs="1")
    fit(config, tmp_path / "run", display=quiet())
    assert {v.dtype for v in weights(tmp_path / "run").values()} == {np.dtype("float64")}


@pytest.mark.parametrize(
    "optimizer,lr",
    [
        ("sgd", "0.03"),
        ("adamw", "0.003"),
        pytest.param("adam", "0.003", marks=pytest.mark.slow),
        pytest.param("rmsprop", "0.0003", marks=pytest.mark.slow),
    ],
)
def test_every_optimizer_learns(tmp_path, optimizer, lr):
    config = small(optimizer={"optimizer": optimizer, "lr": lr}, seed="1")
    report = fit(config, tmp_path / "run", display=quiet())
    assert report["splits"]["train"]["accuracy"] > 0.4


def test_smoke_touches_every_stage(tmp_path):
    outcome = run_script(
        "train.py", "--smoke", "--arch", "resnet20", "--run-dir", tmp_path / "run", "--devices", 1
    )
    assert outcome.status == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["epochs"] == 1 and (tmp_path / "run" / "curves.png").exists()


def test_the_bar_is_one_bar_on_a_terminal(tmp_path):
    console = Console(force_terminal=True, width=120, file=(tmp_path / "screen").open("w"))
    fit(small(epochs="1"), tmp_path / "run", display=Display(console))
    console.file.close()
    screen = (tmp_path / "screen").read_text()
    assert "images/s" in screen and "loss" in screen and "━" in screen


def test_a_config_is_plain_json_both_ways():
    config = small(augment={"mixup": "0.3"}, data={"mean": ["0.5"], "std": ["0.5"]})
    values = json.loads(json.dumps(cli.to_dict(config)))
    assert from_dict(values) == config


def test_config_file_is_read_strictly(tmp_path):
    path = tmp_path / "config.json"
    for text, word in (
        ('{"epoch": 3}', "epoch"),
        ('{"epochs": "3"}', "epochs"),
        ('{"optimizer": {"lr": "fast"}}', "`lr`: .*'fast'"),
        ('{"epochs": 3', "JSON"),
        ("[1]", "object"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            config_from_file(path)


def test_a_loaded_model_is_an_ordinary_module(finished):
    run = load_run(finished[0])
    model = run.network.to_model(run.variables)
    assert isinstance(model, nnx.Module)
    assert model(np.zeros((2, 8, 8, 1), np.float32)).shape == (2, 10)
