"""A recipe trains equally in both frameworks, and the comparison detects a fault."""

import dataclasses

import pytest

from equivalence_tests import mutants, results
from equivalence_tests.parity import tolerances
from equivalence_tests.program.insects import write_folder
from equivalence_tests.studies import same_recipe
from flax_resnet.commands import cli
from flax_resnet.recipes import RECIPES


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that runs `same_recipe` on a few small images: exit status and written row."""
    recipe = RECIPES["imagenette-cnn"]
    smaller = cli.merge(recipe.config, {"batch_size": 16, "data": {"image_size": 16}})
    monkeypatch.setitem(RECIPES, "imagenette-cnn", dataclasses.replace(recipe, config=smaller))
    write_folder(tmp_path / "images", per_class=20, size=20)
    words = ["imagenette-cnn", "--dataset", f"folder:{tmp_path}/images", "--epochs", "1"]
    monkeypatch.setattr("sys.argv", ["same_recipe", *words])
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    return lambda: (same_recipe.main(), results.read("same-imagenette-cnn"))


def test_a_recipe_is_the_same_but_for_rounding(measure):
    status, row = measure()
    assert status == 0 and row["steps"] == len(row["loss_differences"]) == 2
    assert row["rate_difference"] <= tolerances.RULES
    assert 0 < row["control"]["weights_difference"] <= same_recipe.BOUND


@pytest.mark.control
def test_a_fault_of_the_optimizer_is_seen(measure):
    with mutants.injected(mutants.MUTANTS["Adam's eps in the root"]):
        status, row = measure()
    assert status == 1 and row["weights_difference"] > same_recipe.BOUND


def _row(losses, control, weights=1e-13):
    return {
        "steps": len(losses),
        "loss_differences": losses,
        "weights_difference": weights,
        "confusion_matrix_equal": True,
        "control": {"loss_differences": control},
    }


def test_steps_are_judged_until_rounding_has_grown():
    grown = [1e-16, 1e-14, 1e-11, 1e-3]
    equal, reason = same_recipe.judge(_row([1e-16, 1e-13, 1e-10, 1e-2], grown, weights=0.1))
    assert equal and "first 2 of 4 steps" in reason
    assert not same_recipe.judge(_row([1e-16, 1e-6, 1e-6, 1e-2], grown))[0]
    assert not same_recipe.judge(_row([1e-16, float("nan"), 1e-6, 1e-2], grown))[0]


def test_weights_count_when_all_steps_are_judged():
    small = [1e-16, 1e-15]
    assert same_recipe.judge(_row(small, small))[0]
    assert not same_recipe.judge(_row(small, small, weights=1e-6))[0]


def test_rounding_that_grows_at_once_decides_nothing():
    for grown in (1e-9, float("nan")):
        equal, reason = same_recipe.judge(_row([1e-16, 1e-15], [1e-16, grown]))
        assert not equal and reason.startswith("not decided")
