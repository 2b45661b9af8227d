"""The twin's own loop: what it learns, what it writes, when it stops and how it refuses."""

import csv
import dataclasses
import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from flax_resnet import config
from flax_resnet.commands import cli
from flax_resnet.data import sources
from flax_resnet.data.image_files import SUFFIXES
from flax_resnet.runs import environment
from torch_ref import (
    arguments,
    checkpoint,
    create_model,
    data,
    early_stopping,
    evaluate,
    fine_tuning,
    optim,
    run_directory,
)
from torch_ref import train as torch_train

SCORES = {"loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro"}


def fit(model="resnet20", num_images=128, load=None, **options):
    torch.manual_seed(0)
    digits = data.load_data(train_images=num_images, **(load or {}))
    net = create_model(model, 10, digits.num_channels)
    return net, digits, torch_train.fit(net, digits, **({"batch_size": 32} | options))


def test_a_run_learns_and_writes_what_it_found(tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = ["--arch", "resnet20", "--epochs", "3", "--train-images", "512", "--batch-size", "32"]
    assert torch_train.main([*flags, "--run-dir", str(run_dir)]) == 0
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
    batches = data.loader(data.load_data(train_images=512).splits["test"], 100)
    again = evaluate.evaluate(model, batches, torch.device("cpu"), torch.float32)
    assert again["accuracy"] == report["splits"]["test"]["accuracy"]
    assert again["loss"] == pytest.approx(report["splits"]["test"]["loss"], rel=1e-5)


def weights(run_dir):
    return checkpoint.load(run_dir / "weights.pth")


def test_it_starts_from_the_weights_of_a_run(tmp_path):
    """A rate that moves nothing shows them; BatchNorm's statistics move all the same."""
    flags = ["--arch", "resnet20", "--train-images", "128", "--batch-size", "64", "--epochs", "1"]
    assert torch_train.main([*flags, "--run-dir", str(tmp_path / "source")]) == 0
    tuning = [*flags, "--lr", "1e-12", "--seed", "1", "--init-from", str(tmp_path / "source")]
    for name, more in (("same", []), ("head", ["--new-head"]), ("control", ["--lr", "0.1"])):
        assert torch_train.main([*tuning, *more, "--run-dir", str(tmp_path / name)]) == 0
    before = {
        k: v for k, v in weights(tmp_path / "source").items() if k.endswith(("weight", "bias"))
    }
    for name, moved in (("same", ()), ("head", ("fc.",)), ("control", ("",))):
        after = weights(tmp_path / name)
        for key, value in before.items():
            same = np.allclose(after[key], value, rtol=0, atol=1e-6)
            assert same == (not key.startswith(moved or "none")), (name, key)


def test_a_head_of_another_size_is_new_and_another_network_is_refused(tmp_path, capsys):
    torch.manual_seed(0)
    source, target = create_model("resnet20", 7, 1), create_model("resnet20", 10, 1)
    checkpoint.save(tmp_path / "seven.pth", checkpoint.to_arrays(source.state_dict()))
    own = target.fc.weight.clone()
    fine_tuning.start_from(target, tmp_path / "seven.pth")
    assert torch.equal(target.fc.weight, own)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    flags = ["--arch", "resnet32", "--init-from", str(tmp_path / "seven.pth")]
    assert torch_train.main([*flags, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "seven.pth" in error and "layer1.3.conv1.weight" in error and error.count("\n") == 1


def test_early_stopping_restores_the_best_weights():
    """128 images are too few for a validation loss that always falls."""
    net, digits, report = fit(
        epochs=30,
        patience=2,
        monitor="validation_loss",
        optimizer_options={"lr": 0.05, "weight_decay": 0.0},
        schedule_options={"schedule": "constant"},
    )
    assert report["stopped_early"]
    assert report["epochs"] == report["best_epoch"] + 2
    scores = evaluate.evaluate(
        net, data.loader(digits.splits["validation"], 256), torch.device("cpu"), torch.float32
    )
    assert scores["loss"] == report["splits"]["validation"]["loss"]


def test_of_equal_logits_the_first_counts():
    """topk would take any of them."""
    logits = torch.randint(3, (500, 10), generator=torch.Generator().manual_seed(0)).float()
    labels = logits.argmax(1)
    split = [(logits[..., None, None], labels)]
    scores = evaluate.evaluate(torch.nn.Flatten(), split, torch.device("cpu"), torch.float32)
    assert scores["accuracy"] == 1


def test_images_are_as_wide_as_the_run():
    types = torch.float32, torch.float64
    narrow, wide = (data.load_data(dtype=dtype).splits["test"][0][0] for dtype in types)
    assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert 0 < (narrow - wide).abs().max() < 1e-6


def test_weights_that_overflow_in_the_last_step_are_noticed():
    with pytest.raises(FloatingPointError, match="weights after step 0"):
        fit(
            epochs=1,
            batch_size=128,
            optimizer_options={"lr": 1e38, "weight_decay": 1e3},
            schedule_options={"schedule": "constant"},
        )


def test_what_cuda_cannot_do_the_same_twice_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_train.main(["--arch", "basic_cnn", "--deterministic"]) == 2
    assert "AdaptiveAvgPool2d" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_run():
    first, _, _ = fit(epochs=1, seed=4)
    again, _, _ = fit(epochs=1, seed=4)
    other, _, _ = fit(epochs=1, seed=5)
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"accumulate_steps": 2, "clip_norm": 1.0, "l1": 1e-5, "label_smoothing": 0.1},
        {"ema_decay": 0.9, "mixup": 0.2},
        {"schedule_options": {"schedule": "plateau", "warmup_epochs": 0.5}},
        {"optimizer_options": {"optimizer": "rmsprop", "lr": 1e-3}},
        {"load": {"validation_fraction": 0.0}},
        {
            "load": {
                "augment": {
                    "random_crop": 1,
                    "horizontal_flip": 0.5,
                    "rotation": 10.0,
                    "brightness": 0.2,
                    "hue": 0.1,
                    "random_erasing": 0.5,
                }
            }
        },
        {"load": {"augment": {"random_resized_crop": True}, "image_size": 12, "resize_size": 14}},
        {"num_workers": 2},
        {"model": "basic_cnn"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_runs(options):
    net, _, report = fit(epochs=1, num_images=64, **options)
    assert np.isfinite(report["splits"]["test"]["loss"])
    assert next(net.parameters()).dtype == (
        torch.float64 if options.get("dtype") == "float64" else torch.float32
    )


def test_a_machine_without_git_knows_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_directory.environment(torch.device("cpu"))["revision"] is None


def test_both_frameworks_name_the_revision_alike(tmp_path, monkeypatch):
    """With a "+" where the tree was changed since."""
    for module in (run_directory, environment):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "module.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    (tmp_path / "module.py").write_text("one")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "notes.txt").write_text("untracked")
    clean = environment.revision()
    assert run_directory.revision() == clean and len(clean) == 12
    (tmp_path / "module.py").write_text("two")
    assert run_directory.revision() == environment.revision() == f"{clean}+"


def test_both_frameworks_name_the_processor_alike():
    named = run_directory.environment(torch.device("cpu"))["device"]
    assert named == environment.describe(1)["device"] != platform.machine()


def test_accumulated_gradients_are_those_of_the_whole_batch():
    images, labels = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    nets = []
    for size in (8, 4):
        torch.manual_seed(0)
        net = create_model("basic_cnn", 10, 1).double()
        rule = optim.make_optimizer(net)
        for step, at in enumerate(range(0, 8, size)):
            batch = images[at : at + size], labels[at : at + size]
            torch_train.train_step(net, rule, *batch, accumulate_steps=8 // size, step=step)
        nets.append(net)
    for whole, halves in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(whole, halves, rtol=1e-12, atol=1e-14)


def test_splits_are_stratified_disjoint_and_repeatable():
    digits = data.load_data()
    sizes = {name: len(split) for name, split in digits.splits.items()}
    assert sizes == {"train": 1293, "validation": 144, "test": 360}
    counts = np.bincount(digits.splits["test"].labels)
    assert counts.min() >= 34 and counts.max() <= 38
    again = data.load_data()
    np.testing.assert_array_equal(digits.splits["test"].items, again.splits["test"].items)
    image, label = digits.splits["train"][0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and isinstance(label, int)
    stacked = torch.stack([image for image, _ in digits.splits["train"]])
    assert stacked.mean().abs() < 1e-5 and abs(stacked.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize("count", [100, 5, 1293 - 3])
def test_both_frameworks_use_the_same_images(count):
    """Held out and limited alike: also where the count is not enough for every class."""
    theirs = data.load_data(train_images=count, eval_images=100).splits
    fields = config.DataConfig(train_images=count, eval_images=100)
    ours = sources.open_dataset(fields)
    assert len(ours.train) == count and len(ours.test) == 100
    for name in ("train", "validation", "test"):
        split = getattr(ours, name)
        np.testing.assert_array_equal(theirs[name].labels, split.labels)
        images = np.stack([split[i] for i in range(len(split))])
        np.testing.assert_array_equal(theirs[name].items, images[..., 0])


def write_folder(root, splits, mode="RGB"):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(5):
                pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{i}.png")
    return f"folder:{root}"


def test_limits_are_upper_limits():
    limited = data.load_data(train_images=100, eval_images=90).splits
    assert {name: len(split) for name, split in limited.items()} == {
        "train": 100, "validation": 90, "test": 90,
    }  # fmt: skip
    assert len(data.load_data(eval_images=10**6).splits["test"]) == len(
        data.load_data().splits["test"]
    )


@pytest.mark.parametrize(
    "found, sizes",
    [
        (("train", "val", "test"), {"train": 10, "validation": 10, "test": 10}),
        (("train", "test"), {"train": 8, "validation": 2, "test": 10}),
        (("train", "val"), {"train": 8, "validation": 2, "test": 10}),
    ],
)
def test_folders(tmp_path, found, sizes):
    name = write_folder(tmp_path, found)
    images = data.load_data(dataset=name, image_size=16, validation_fraction=0.2)
    assert {split: len(value) for split, value in images.splits.items()} == sizes
    assert images.class_names == ["cat", "dog"] and images.num_channels == 3
    assert images.splits["train"][0][0].shape == (3, 16, 16)


def test_both_sides_find_the_same_images(tmp_path):
    """Of every suffix; nothing that is hidden."""
    name = write_folder(tmp_path, ["train", "test"])
    train, image = tmp_path / "train", Image.new("RGB", (8, 8))
    for number, suffix in enumerate(sorted({*IMG_EXTENSIONS, *SUFFIXES})):
        image.convert("L" if suffix == ".pgm" else "RGB").save(train / "cat" / f"{number}{suffix}")
    (train / "cat" / "notes.txt").write_text("meow")
    (train / "cat" / "._0.png").write_bytes(b"hidden")
    for hidden in (train / ".ipynb_checkpoints", train / "dog" / ".thumbnails"):
        hidden.mkdir()
        image.save(hidden / "0.png")
    splits, class_names = data.read_dataset(name)
    other = sources.open_dataset(config.DataConfig(dataset=name, validation_fraction=0))
    assert other.class_names == tuple(class_names) == ("cat", "dog")
    twin, ours = splits["train"], other.train
    assert dict(zip(twin.items, twin.labels, strict=True)) == dict(
        zip(map(str, ours.names), ours.labels, strict=True)
    )


@pytest.mark.parametrize("grayscale, channels", [(False, 3), (True, 1)])
def test_a_folder_of_gray_images_has_the_channels_of_the_other_side(tmp_path, grayscale, channels):
    settings = dict(dataset=write_folder(tmp_path, ["train"], "L"), validation_fraction=0.3)
    images = data.load_data(grayscale=grayscale, **settings)
    assert images.num_channels == channels and images.image_size == 224
    assert (
        sources.open_dataset(config.DataConfig(grayscale=grayscale, **settings)).channels
        == channels
    )


def test_flags_have_the_names_and_defaults_of_the_config():
    args = vars(torch_train.parse([]))
    groups = [config.TrainConfig, config.ModelConfig, config.DataConfig, config.AugmentConfig]
    groups += [config.OptimizerConfig, config.ScheduleConfig, config.EarlyStoppingConfig]
    defaults = {}
    for group in groups:
        values = group()
        defaults |= {f.name: getattr(values, f.name) for f in dataclasses.fields(group)}
    assert set(args) - set(defaults) == {"run_dir", "device"}
    assert args == {name: defaults.get(name) for name in args}


def test_defaults_of_early_stopping_are_those_of_the_flags():
    fit_defaults = arguments.keywords(torch_train.fit)
    state = early_stopping.EarlyStopping()
    assert state.patience == fit_defaults["patience"]
    assert state.min_delta == fit_defaults["min_delta"]


NUMBERS = (
    *("-1", "-0.1", "0", "0.25", "0.5", "0.75", "1", "2", "180", "181", "256", "257", "512", "513"),
    *("4096", "4097", "100000", "100001", "1000000", "1000001", "2147483648", "inf", "nan"),
)
OPEN = ("image_size", "resize_size", "random_crop", "train_images", "eval_images", "std")


def test_numbers_have_the_limits_of_the_config(capsys):
    parser = torch_train.make_parser()
    group_of = {
        name: group
        for group, values in config.to_dict(config.TrainConfig()).items()
        for name in (values if isinstance(values, dict) else ())
    }
    different, tried = [], 0
    for name, default in vars(parser.parse_args([])).items():
        if type(default) in (int, float) or name in (*OPEN, "milestones"):
            for text in NUMBERS:
                tried += 1
                if twin_takes(parser, name, text) != config_takes(group_of.get(name), name, text):
                    different.append(f"--{name} {text}")
    assert tried > 40 * len(NUMBERS) and not different


def twin_takes(parser, name, text):
    try:
        parser.parse_args([f"--{name.replace('_', '-')}={text}"])
    except SystemExit:
        return False
    return True


def config_takes(group, name, text):
    values = {name: [text] if name in ("milestones", "std") else text}
    if name == "std":
        values["mean"] = [0.5]
    try:
        cli.merge(config.TrainConfig(), {group: values} if group else values)
    except config.InputError:
        return False
    return True


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--label-smoothing", "2"], "--label-smoothing: 2 is not in [0, 0.999999]"),
        (["--div-factor", "0"], "--div-factor: 0 is not in [0.001, 1e+30]"),
        (["--mean", *"010", "--std", *"111"], "mean has 3 values, the images 1 channel"),
        (["--test-fraction", "0"], "test_fraction 0"),
        (["--arch", "resnet81"], "resnet18"),
        (["--dataset", "folder:missing"], "missing"),
        (["--dataset", "digit"], "digit"),
        (["--batch-size", "5000"], "5000"),
        (["--optimizer", "sdg"], "sdg"),
        (["--epoch", "3"], "--epoch"),
        (["--dropout", "1.5"], "1.5"),
        (["--arch", "resnet20", "--stem", "cifar"], "stem"),
        (["--arch", "basic_cnn", "--zero-init-residual"], "no residual blocks"),
        (["--cycle-momentum", "--schedule", "cosine"], "cosine"),
        (["--cycle-momentum", "--momentum", "0"], "momentum 0"),
        (["--new-head"], "--init-from"),
        (["--init-from", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, word, tmp_path, capsys):
    try:
        status = torch_train.main([*flags, "--run-dir", str(tmp_path / "run")])
    except SystemExit as left:
        status = left.code
    assert status == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_never_written_over(tmp_path):
    (tmp_path / "report.json").write_text("mine")
    command = [sys.executable, "-m", "torch_ref.train", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "report.json").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run_with_status_1(tmp_path, capsys):
    flags = ["--arch", "basic_cnn", "--lr", "1e30", "--train-images", "256", "--epochs", "1"]
    assert torch_train.main([*flags, "--run-dir", str(tmp_path / "run")]) == 1
    assert "step" in capsys.readouterr().err
