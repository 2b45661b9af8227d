"""Recipes of public weights train alike in both frameworks, and agree with what is published."""

import dataclasses
import re

import numpy as np
import pytest
import torchvision.models
from rich.console import Console

from equivalence_tests.parity import tolerances
from equivalence_tests.program.command import ROOT, refused, run_script
from equivalence_tests.studies import trajectory
from flax_resnet.commands import cli, train
from flax_resnet.config import AugmentConfig, TrainConfig, flat, idle
from flax_resnet.imagenet_recipes import IMAGENET_RECIPES
from flax_resnet.runs.display import Display
from flax_resnet.training import fit
from torch_ref.train import check_supported

STEPS = 21
KINDS = (
    "torchvision-resnet50-v2", "timm-a1", "timm-a2", "timm-a3", "torchvision-resnet50-v1",
    "he2015-imagenet",
)  # fmt: skip


def smaller(config: TrainConfig) -> TrainConfig:
    """The recipe on a few digits with a small network, in float64, without random augmentation:
    three steps an epoch, with the warm-up and the first averages inside the run."""
    augment = AugmentConfig(
        random_crop=0, repeated_augmentation=config.augment.repeated_augmentation
    )
    changes = {
        "epochs": STEPS // 3,
        "batch_size": 32,
        "log_steps": 1,
        "model": {"arch": "resnet20", "stem": None, "dtype": "float64", "stochastic_depth": 0.0},
        "data": {
            "dataset": "digits", "image_size": 8, "resize_size": 8, "train_size": None,
            "train_images": 96, "eval_images": 20, "mean": None, "std": None, "cache": "auto",
        },
        "optimizer": {"ema_steps": min(config.optimizer.ema_steps, 2)},
        "schedule": {"warmup_epochs": min(config.schedule.warmup_epochs, 2)},
        "parallel": {"devices": 1},
        "compilation_cache": False,
    }  # fmt: skip
    if config.schedule.schedule == "step":
        changes["schedule"]["step_epochs"] = 3
    return cli.merge(dataclasses.replace(config, augment=augment), changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_steps_of_a_recipe_are_equal_in_both_frameworks(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    got, expected = trajectory.both(smaller(IMAGENET_RECIPES[name].config))
    assert len(got.losses) == len(expected.losses) == STEPS
    np.testing.assert_allclose(got.rates, expected.rates, rtol=1e-12)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=tolerances.TRAINING_FAST)
    assert trajectory.distance(got.weights, expected.weights) <= tolerances.TRAINING
    assert abs(got.losses[-1] - got.losses[0]) > 0.01  # it has trained


def smoked(config: TrainConfig, dataset: str = "none") -> TrainConfig:
    """The recipe under --smoke, on small images with a small network."""
    changes = {
        "model": {"arch": "resnet20", "stem": None},
        "data": {"dataset": f"folder:{dataset}", "image_size": 16, "resize_size": 18},
        "parallel": {"devices": 1},
    }
    if config.data.train_size:
        changes["data"]["train_size"] = 12
    return cli.merge(cli.merge(config, cli.SMOKE), changes)


DISTINCT = {repr(smoked(recipe.config)): name for name, recipe in IMAGENET_RECIPES.items()}


def test_the_page_on_a_recipe_names_its_settings(monkeypatch):
    """The flags in its table make the recipe, but for the place of the data and the decay."""
    page = (ROOT / "docs/recipe.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ")]
    flags = " ".join(" ".join(re.findall("`(--[^`]*)`", row[2])) for row in rows)
    words = flags.replace("--ema-decay ...", "--ema-decay 0.9").split()
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    made = flat(train.new_config(train.parse()))
    recipe = flat(IMAGENET_RECIPES["torchvision-resnet50-v2"].config)
    assert {name for name in made if made[name] != recipe[name]} == {
        "data.dataset", "data.mean", "data.std", "data.cache", "augment.random_crop",
        "optimizer.ema_decay", "early_stopping.monitor",
    }  # fmt: skip


QUICKEST = "torchvision-resnet50-v2"
"""The others are slow tests; most of them take a minute each."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == QUICKEST else pytest.mark.slow) for n in DISTINCT.values()],
)
def test_every_recipe_runs_all_stages_under_smoke(name, folder, tmp_path):
    """The recipes of a family differ in the network alone, which is replaced by a small one."""
    config = smoked(IMAGENET_RECIPES[name].config, folder)
    report = fit.fit(config, tmp_path / "run", display=Display(Console(quiet=True)))
    assert np.isfinite(report["splits"]["test"]["loss"])


def test_a_batch_that_the_devices_cannot_share_is_refused(folder, tmp_path):
    flags = ["--recipe", "torchvision-resnet18-v1", "--dataset", f"folder:{folder}"]
    outcome = run_script("train.py", *flags, "--devices", 3, "--run-dir", tmp_path / "run")
    refused(outcome, "--batch-size 256 cannot be divided among 3 devices")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", IMAGENET_RECIPES)
def test_every_setting_of_a_recipe_has_an_effect_in_both_frameworks(name):
    config = IMAGENET_RECIPES[name].config
    assert not idle(config)
    check_supported(config)


@pytest.mark.parametrize("name", [n for n in IMAGENET_RECIPES if n.startswith("torchvision")])
def test_published_accuracies_are_torchvisions(name):
    _, arch, version = name.split("-")
    weights = torchvision.models.get_model_weights(arch)[f"IMAGENET1K_{version.upper()}"]
    published = IMAGENET_RECIPES[name].published["validation_accuracy"]
    assert published == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100)
    config, transforms = IMAGENET_RECIPES[name].config, weights.transforms()
    assert config.model.arch == arch
    assert ([config.data.image_size], [config.data.resize_size]) == (
        transforms.crop_size,
        transforms.resize_size,
    )
    assert (*config.data.mean, *config.data.std) == (*transforms.mean, *transforms.std)
    assert config.data.interpolation == transforms.interpolation.value
