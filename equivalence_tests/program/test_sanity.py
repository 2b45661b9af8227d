"""Warnings about runs that end without an error and learned little."""

import json

import numpy as np
import pytest

import torch_ref.prepare
from equivalence_tests.program.command import train
from equivalence_tests.program.insects import write_folder
from flax_resnet.commands import cli
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.prepare import prepare
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError
from flax_resnet.recipes import RECIPES
from flax_resnet.training import sanity

UNLIKE = np.eye(3, dtype=int) * 5
"""A confusion matrix of three classes in which each is predicted."""


@pytest.mark.parametrize(
    "num_images, batch_size, words",
    [
        (153, 128, ["only 1 step(s)", "25 of 153"]),
        (900, 100, ["only 9 step(s)"]),
        (1_099, 100, ["99 of 1,099"]),
        (1_010, 100, []),
        (1_294, 128, []),  # the README's first command
        (45_000, 128, []),
    ],
)
def test_few_steps_and_many_dropped_images(num_images, batch_size, words):
    found = sanity.of_training(num_images, batch_size)
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found, strict=True))


IDLE = [
    ({"schedule": {"schedule": "multistep"}}, "`milestones` 100 150 lies beyond the 16 epoch(s)"),
    ({"schedule": {"schedule": "multistep", "milestones": (3, 16)}}, "`milestones` 16 lies beyond"),
    ({"schedule": {"schedule": "step"}}, "`step_epochs` 30 lies beyond"),
    ({"schedule": {"schedule": "plateau", "plateau_patience": 20}}, "`plateau_patience` 20 lies"),
    ({"schedule": {"warmup_epochs": 16.5}}, "`warmup_epochs` 16.5 lies beyond"),
    (
        {"schedule": {"schedule_per": "epoch", "warmup_epochs": 0.5}},
        "`warmup_epochs` 0.5: with `schedule_per` epoch the warm-up has 0 epoch(s)",
    ),
    ({"early_stopping": {"patience": 17}}, "`patience` 17 lies beyond"),
    ({"schedule": {"schedule": "cosine", "min_lr": 0.1}}, "`min_lr` 0.1 is above `lr` 0.04"),
    ({"optimizer": {"momentum": 0}}, "`nesterov` has no effect with `momentum` 0"),
    ({"augment": {"hue": 0.1}}, "`hue` has no effect: the images are gray"),
    ({"augment": {"saturation": 0.1}}, "`saturation` has no effect: the images are gray"),
    (
        {"schedule": {"cycle_momentum": True}, "optimizer": {"momentum": 0.8}},
        "`momentum` has no effect: `cycle_momentum` sets it",
    ),
    (
        {"schedule": {"cycle_momentum": True}, "optimizer": {"optimizer": "adam", "beta1": 0.8}},
        "`beta1` has no effect: `cycle_momentum` sets it",
    ),
    (
        {"optimizer": {"optimizer": "adamw", "decoupled_weight_decay": True}},
        "`decoupled_weight_decay` has no effect: adamw's always is",
    ),
    (
        {"optimizer": {"ema_decay": 0.9, "ema_after_warmup": True}},
        "`ema_after_warmup` has no effect: there is no warm-up",
    ),
    (
        {"schedule": {"schedule": "cosine", "warmup_within": True}},
        "`warmup_within` has no effect: there is no warm-up",
    ),
    (
        {"data": {"split_seed": 1, "validation_fraction": 0}},
        "`split_seed` has no effect: no split is drawn",
    ),
    (
        {"data": {"validation_fraction": 0}, "early_stopping": {"restore_best": False}},
        "`restore_best` has no effect: there is no validation split",
    ),
    (
        {"data": {"test_fraction": 0.3}},
        "`test_fraction` has no effect: the data set has such a split",
    ),
]


@pytest.mark.parametrize("changes, words", IDLE, ids=str)
def test_settings_of_no_effect_are_named(changes, words):
    found = sanity.of_settings(cli.merge(TrainConfig(), changes), 1, ("test",))
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_has_settings_of_no_effect(name):
    """Two recipes are excepted, because their source has such a setting."""
    patience = ["`patience` 5 lies beyond the 2 epoch(s) of the run"]
    published = dict.fromkeys(("cifar10-resnet50-224", "cifar10-resnet50-64px"), patience)
    assert sanity.of_settings(RECIPES[name].config, 3, ()) == published.get(name, [])


def test_a_colour_jitter_of_coloured_images_and_a_cut_where_one_is_made_are_used():
    used = {"augment": {"hue": 0.1}, "data": {"test_fraction": 0.3}, "epochs": 2}
    assert sanity.of_settings(cli.merge(TrainConfig(), used), 3, ("validation",)) == []


@pytest.mark.parametrize(
    "changes, own_splits",
    [
        ({"data": {"split_seed": 1}}, ("test",)),
        ({"data": {"split_seed": 1, "train_images": 64}}, ("validation", "test")),
        ({"data": {"split_seed": 1, "folds": 2, "fold": 0}}, ("validation", "test")),
        ({"early_stopping": {"restore_best": False}}, ()),
        ({"early_stopping": {"restore_best": False}}, ("validation", "test")),
        ({"optimizer": {"momentum": 0.8}}, ()),
        ({"optimizer": {"decoupled_weight_decay": True}}, ()),
        ({"optimizer": {"ema_decay": 0.9, "ema_after_warmup": True},
          "schedule": {"warmup_epochs": 1}}, ()),
    ],
)  # fmt: skip
def test_settings_that_are_used_are_not_named(changes, own_splits):
    config = cli.merge(TrainConfig(), changes)
    assert not [line for line in sanity.of_settings(config, 3, own_splits) if "effect" in line]


@pytest.mark.parametrize(
    "num_steps, optimizer, named",
    [
        (40, {"ema_decay": 0.9, "ema_steps": 40}, True),
        (40, {"ema_decay": 0.9, "ema_steps": 39}, False),
        (40, {"ema_decay": 0.9, "ema_steps": 10, "accumulate_steps": 4}, True),
        (40, {"ema_decay": 0.0, "ema_steps": 1}, False),
        (1, {"ema_decay": 0.9}, False),
    ],
)
def test_an_average_that_takes_no_update_is_named(num_steps, optimizer, named):
    found = sanity.of_updates(cli.merge(TrainConfig(), {"optimizer": optimizer}), num_steps)
    assert len(found) == named and all("`ema_steps`" in line for line in found)


@pytest.mark.parametrize("framework", [prepare, torch_ref.prepare.prepare])
def test_gradients_of_more_steps_than_the_run_has_are_refused(framework):
    """They would be averaged and never used."""
    data = {"train_images": 80, "eval_images": 20}
    changes = {"epochs": 3, "batch_size": 40, "data": data, "optimizer": {"accumulate_steps": 6}}
    config = cli.merge(TrainConfig(), changes)
    assert framework(config).config.batch_size == 40
    with pytest.raises(InputError, match="`accumulate_steps` 7.* 6 step"):
        framework(cli.merge(config, {"optimizer": {"accumulate_steps": 7}}))


def test_the_splits_that_a_set_brings_with_it_are_known(tmp_path):
    write_folder(tmp_path, splits=("train", "val"))
    assert open_dataset(DataConfig(dataset=f"folder:{tmp_path}")).own_splits == ("test",)
    assert open_dataset(DataConfig()).own_splits == ()


@pytest.mark.parametrize(
    "loss, confusion, words",
    [
        (0.1, UNLIKE, []),
        (1.2, UNLIKE, []),  # guessing: log(3) = 1.0986
        (1.7, UNLIKE, ["the loss 1.7 is far above 1.1"]),
        (1.0, np.array([[0, 5, 0], [0, 5, 0], [0, 4, 0]]), ["every image is predicted as cat"]),
        (1.0, np.array([[0, 0, 0], [0, 5, 0], [0, 0, 0]]), []),  # there is no other class
    ],
)
def test_one_predicted_class_and_a_loss_above_guessing(loss, confusion, words):
    found = sanity.of_results({"test": {"loss": loss}}, {"test": confusion}, ["ant", "cat", "dog"])
    assert len(found) == len(words) and all(w in f for w, f in zip(words, found, strict=True))


def test_a_run_says_them_and_keeps_them_in_its_report(tmp_path):
    outcome = train(tmp_path / "run", "--train-images", 70, "--epochs", 1, "--lr", 10, "--hue", 0.1)
    assert "warning: `hue` has no effect" in outcome.out
    assert outcome.status == 0 and "warning: an epoch has only 2 step(s)" in outcome.out
    warnings = json.loads((tmp_path / "run" / "report.json").read_text())["warnings"]
    assert any("far above 2.3" in warning for warning in warnings)
    assert all(f"warning: {warning}" in outcome.out for warning in warnings)
