"""Warnings about runs that end without an error and learned little."""

import json

import numpy as np
import pytest

from equivalence_tests.program.command import train
from equivalence_tests.program.insects import write_folder
from flax_resnet.commands import cli
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.sources import open_dataset
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
    ({"early_stopping": {"patience": 17}}, "`patience` 17 lies beyond"),
    ({"schedule": {"schedule": "cosine", "min_lr": 0.1}}, "`min_lr` 0.1 is above `lr` 0.04"),
    ({"optimizer": {"momentum": 0}}, "`nesterov` has no effect with `momentum` 0"),
    ({"augment": {"hue": 0.1}}, "`hue` has no effect: the images are gray"),
    ({"augment": {"saturation": 0.1}}, "`saturation` has no effect: the images are gray"),
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
    """One recipe is excepted, because its source has such a setting."""
    published = {"cifar10-resnet50-224": ["`patience` 5 lies beyond the 2 epoch(s) of the run"]}
    assert sanity.of_settings(RECIPES[name].config, 3, ()) == published.get(name, [])


def test_a_colour_jitter_of_coloured_images_and_a_cut_where_one_is_made_are_used():
    used = {"augment": {"hue": 0.1}, "data": {"test_fraction": 0.3}, "epochs": 2}
    assert sanity.of_settings(cli.merge(TrainConfig(), used), 3, ("validation",)) == []


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
