"""The study of how much of a test loss is bad calibration."""

import json

import numpy as np
import pytest
from scipy.special import softmax

import flax_resnet
from equivalence_tests.studies import temperature


def drawn(scale: float, images: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from the probabilities of logits, and these logits times `scale`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(images, 5)) * 2
    uniform = rng.uniform(size=(images, 1))
    labels = (softmax(logits, axis=1).cumsum(1) < uniform).sum(1)
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_of_logits_that_are_too_large_is_found(scale):
    logits, labels = drawn(scale)
    assert temperature.fitted(logits, labels) == pytest.approx(scale, rel=0.03)
    best = temperature.loss(logits, labels, scale)
    assert best == pytest.approx(temperature.loss(*drawn(1.0)))
    assert scale == 1.0 or best < temperature.loss(logits, labels) - 0.05


def test_a_run_is_measured_on_the_images_of_its_own_splits(insects):
    found = temperature.measure(flax_resnet.load_run(insects))
    splits = json.loads((insects / "report.json").read_text())["splits"]
    for split in ("validation", "test"):
        assert found[f"{split}_loss"] == pytest.approx(splits[split]["loss"], abs=1e-6)
    assert found["test_accuracy"] == splits["test"]["accuracy"]
    assert found["validation_loss_scaled"] < found["validation_loss"]
