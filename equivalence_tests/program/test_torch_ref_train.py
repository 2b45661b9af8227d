"""The twin's own loop: what it learns, what it writes, when it stops and what it lacks."""

import csv
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from equivalence_tests.program.twin import call, fit, small
from flax_resnet.config import OptimizerConfig, TrainConfig, flat
from flax_resnet.errors import InputError
from torch_ref import (
    checkpoint,
    create_model,
    evaluation,
    guard,
    loop,
    optim,
    pipeline,
    prepare,
    restore,
    steps,
)
from torch_ref import train as torch_train

SCORES = {"loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro"}
CPU = torch.device("cpu")


def test_a_run_learns_and_writes_what_it_found(tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = ["--arch", "resnet20", "--epochs", "3", "--train-images", "512", "--batch-size", "32"]
    assert call(*flags, "--run-dir", run_dir) == 0
    assert capsys.readouterr().out.count("epoch") == 3
    report = json.loads((run_dir / "report.json").read_text())
    assert set(report["splits"]) == {"train", "validation", "test"}
    assert all(set(scores) == SCORES for scores in report["splits"].values())
    assert report["epochs"] == 3 and not report["stopped_early"]
    assert report["splits"]["test"]["accuracy"] > 0.5
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.04 / 25 / 1e4)  # one-cycle's end
    best = rows[report["best_epoch"] - 1]
    assert float(best["validation_loss"]) == report["splits"]["validation"]["loss"]

    model = create_model("resnet20", 10, 1)
    model.load_state_dict(checkpoint.to_tensors(checkpoint.load(run_dir / "weights.pth")))
    data = prepare.prepare(small(data={"train_images": 512, "eval_images": None})).dataset
    batches = pipeline.loader(data.splits["test"], 100)
    again = evaluation.evaluate(model, batches, CPU, torch.float32)
    assert again["accuracy"] == report["splits"]["test"]["accuracy"]
    assert again["loss"] == pytest.approx(report["splits"]["test"]["loss"], rel=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_trains_to_the_same_weights(tmp_path, monkeypatch, backend):
    """Inductor fuses operations, which rounds otherwise: 1e-11 leaves a few digits of float64."""
    calls, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net: calls.append(net) or compile(net, backend=backend)
    )
    flags = ["--arch", "basic_cnn", "--epochs", 1, "--train-images", 128]
    flags += ["--batch-size", 64, "--dtype", "float64", "--dropout", 0]
    weights = {}
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        assert call(*flags, *more, "--run-dir", tmp_path / name) == 0
        weights[name] = checkpoint.load(tmp_path / name / "weights.pth")
    assert len(calls) == 1
    for name, value in weights["eager"].items():
        np.testing.assert_allclose(weights["compiled"][name], value, rtol=0, atol=1e-11)


def test_it_starts_from_the_weights_of_a_run(tmp_path):
    """A rate that moves nothing shows them; BatchNorm's statistics move all the same."""
    _, source = fit(tmp_path / "source")
    before = {k: v for k, v in source.items() if k.endswith(("weight", "bias"))}
    tuning = dict(seed=1, init_from=str(tmp_path / "source"))
    for name, moved, lr in (("same", (), 1e-12), ("head", ("fc.",), 1e-12), ("all", ("",), 0.1)):
        changes = tuning | {"optimizer": {"lr": lr}, "new_head": name == "head"}
        _, after = fit(tmp_path / name, **changes)
        for key, value in before.items():
            same = np.allclose(after[key], value, rtol=0, atol=1e-6)
            assert same == (not key.startswith(moved or "none")), (name, key)


def test_a_head_of_another_size_is_new_and_another_network_is_refused(tmp_path, capsys):
    torch.manual_seed(0)
    source, target = create_model("resnet20", 7, 1), create_model("resnet20", 10, 1)
    checkpoint.save(tmp_path / "seven.pth", checkpoint.to_arrays(source.state_dict()))
    own = target.fc.weight.clone()
    restore.fine_tune(target, tmp_path / "seven.pth")
    assert torch.equal(target.fc.weight, own)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    flags = ["--arch", "resnet32", "--init-from", tmp_path / "seven.pth"]
    assert call(*flags, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "seven.pth" in error and "layer1.3.conv1.weight" in error and error.count("\n") == 1


def test_early_stopping_restores_the_best_weights(tmp_path):
    """128 images are too few for a validation loss that always falls."""
    report, _ = fit(
        tmp_path / "run",
        epochs=30,
        data={"train_images": 128, "eval_images": None},
        early_stopping={"patience": 2},
        optimizer={"lr": 0.05, "weight_decay": 0.0},
        schedule={"schedule": "constant"},
    )
    assert report["stopped_early"]
    assert report["epochs"] == report["best_epoch"] + 2
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    losses = [float(row["validation_loss"]) for row in rows]
    assert min(losses) == losses[-3] == report["splits"]["validation"]["loss"]


def test_of_equal_logits_the_first_counts():
    """The function torch.topk would take any of them."""
    logits = torch.randint(3, (500, 10), generator=torch.Generator().manual_seed(0)).float()
    labels = logits.argmax(1)
    split = [(logits[..., None, None], labels)]
    scores = evaluation.evaluate(torch.nn.Flatten(), split, CPU, torch.float32)
    assert scores["accuracy"] == 1


def test_images_are_as_wide_as_the_run():
    found = [
        prepare.prepare(small(model={"dtype": dtype})).dataset.splits["test"][0][0]
        for dtype in ("float32", "float64")
    ]
    narrow, wide = found
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert 0 < (narrow - wide).abs().max() < 1e-6


def test_weights_that_overflow_in_the_last_step_are_noticed(tmp_path):
    rule = {"lr": 1e30, "weight_decay": 1e30}
    with pytest.raises(guard.NonFiniteLoss, match="weights after step 0"):
        fit(tmp_path / "run", batch_size=64, optimizer=rule, schedule={"schedule": "constant"})


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = [fit(tmp_path / str(n), seed=seed)[1]["fc.weight"] for n, seed in enumerate((4, 4, 5))]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16", "dropout": 0.1, "zero_init_residual": True}},
        {"model": {"dtype": "float64", "shortcut": "projection", "num_classes": 10}},
        {"optimizer": {"accumulate_steps": 2, "clip_norm": 1.0, "l1": 1e-5}},
        {"optimizer": {"ema_decay": 0.9}, "augment": {"mixup": 0.2, "cutmix": 1.0},
         "data": {"sampler": "balanced"}},
        {"optimizer": {"optimizer": "rmsprop", "lr": 1e-3, "centered": True, "alpha": 0.9}},
        {"optimizer": {"optimizer": "adam", "lr": 1e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-7}},
        {"optimizer": {"optimizer": "adamw", "lr": 1e-3, "decay_norm_and_bias": False}},
        {"optimizer": {"decoupled_weight_decay": True, "nesterov": False, "momentum": 0.5}},
        {"schedule": {"schedule": "plateau", "warmup_epochs": 0.5, "plateau_patience": 1}},
        {"schedule": {"schedule": "multistep", "milestones": [1, 2], "gamma": 0.5}},
        {"schedule": {"schedule": "cosine", "min_lr": 1e-4}},
        {"schedule": {"cycle_momentum": True, "pct_start": 0.4, "div_factor": 5.0}},
        {"early_stopping": {"restore_best": False, "monitor": "validation_f1_macro"}},
        {"data": {"validation_fraction": 0.0, "split_seed": 1, "eval_images": 20}},
        {"data": {"mean": [0.3], "std": [0.4]}},
        {"augment": {"random_crop": 1, "horizontal_flip": 0.5, "rotation": 10.0, "hue": 0.1,
                     "brightness": 0.2, "contrast": 0.1, "saturation": 0.1,
                     "random_erasing": 0.5}},
        {"augment": {"random_resized_crop": True, "scale": [0.3, 1.0], "vertical_flip": 0.5,
                     "auto_augment": "ra", "ra_magnitude": 5, "repeated_augmentation": 2},
         "data": {"image_size": 12, "resize_size": 14, "interpolation": "bicubic"}},
        {"data": {"num_workers": 2, "cache": "none"}, "parallel": {"devices": 1}},
        {"model": {"arch": "resnet18", "stem": "cifar"}},
        {"model": {"arch": "basic_cnn"}, "deterministic": True, "eval_batch_size": 16},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_runs(changes, tmp_path):
    with mock.patch.object(torch_train, "set_up", wraps=torch_train.set_up) as set_up:
        report, weights = fit(tmp_path / "run", **changes)
    assert np.isfinite(report["splits"]["test"]["loss"])
    wide = changes.get("model", {}).get("dtype") == "float64"
    assert weights["fc.weight"].dtype == (np.float64 if wide else np.float32)
    used = flat(set_up.call_args.args[1].config)  # with what was left open filled in
    asked = flat(small(**changes))
    assert all(used[name] == value for name, value in asked.items() if value is not None)


def test_every_field_of_the_config_is_used_refused_or_without_effect():
    folder = Path(torch_train.__file__).parent
    used = set(
        re.findall(r"\.([a-z_0-9]+)\b(?!\()", "".join(map(Path.read_text, folder.glob("*.py"))))
    )
    names = {name.rpartition(".")[2] for name in flat(TrainConfig())}
    others = {*torch_train.LACKING, *torch_train.WITHOUT_EFFECT}
    assert names - used <= others <= names


@pytest.mark.parametrize(
    "name, changes",
    [
        ("freeze_backbone", {"freeze_backbone": True, "init_from": "run"}),
        ("weights_key", {"weights_key": "model", "init_from": "run"}),
        ("ema", {"ema": True, "init_from": "run"}),
        ("skip_nonfinite", {"skip_nonfinite": 3}),
        ("on_bad_image", {"data": {"on_bad_image": "skip", "dataset": "folder:nowhere"}}),
    ],
)
def test_a_setting_that_the_twin_lacks_is_named(name, changes, tmp_path):
    with pytest.raises(InputError, match=f"^`{name}`: torch_ref has no such setting"):
        torch_train.fit(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["torchvision:resnet18", "https://host/weights.pth"])
def test_weights_by_name_are_converted_for_the_twin(source, tmp_path):
    with pytest.raises(InputError, match=f"^`init_from` {source}: .* convert {source} FILE.pth"):
        torch_train.fit(small(init_from=source), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_has_no_effect_is_said(tmp_path, capsys):
    parallel = {"devices": 2, "parallel": "pmap"}
    with mock.patch.object(loop, "train", side_effect=guard.NonFiniteLoss):
        with pytest.raises(guard.NonFiniteLoss):
            torch_train.fit(small(parallel=parallel), tmp_path / "run")
    assert "without effect here: parallel, devices\n" in capsys.readouterr().out


def test_accumulated_gradients_are_those_of_the_whole_batch():
    images, labels = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    nets = []
    for size in (8, 4):
        torch.manual_seed(0)
        net = create_model("basic_cnn", 10, 1).double()
        rule = OptimizerConfig(accumulate_steps=8 // size)
        optimizer = optim.make_optimizer(net, rule)
        for step, at in enumerate(range(0, 8, size)):
            batch = images[at : at + size], labels[at : at + size]
            steps.train_step(net, optimizer, *batch, rule, step=step)
        nets.append(net)
    for whole, halves in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(whole, halves, rtol=1e-12, atol=1e-14)
