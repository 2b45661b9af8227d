"""Warnings about runs that end without an error and learned little."""

import json

import numpy as np
import pytest

from equivalence_tests.program.command import train
from flax_resnet.training import sanity

UNLIKE = np.eye(3, dtype=int) * 5
"""A confusion matrix of three classes, each predicted."""


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
    outcome = train(tmp_path / "run", "--train-images", 70, "--epochs", 1, "--lr", 10)
    assert outcome.status == 0 and "warning: an epoch has only 2 step(s)" in outcome.out
    warnings = json.loads((tmp_path / "run" / "report.json").read_text())["warnings"]
    assert any("far above 2.3" in warning for warning in warnings)
    assert all(f"warning: {warning}" in outcome.out for warning in warnings)
