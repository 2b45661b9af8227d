"""Whole trainings agree in both frameworks.

Compared are all losses and learning rates, the last epoch, the metrics of the best weights, and the
weights.
"""

import numpy as np
import pytest

from equivalence_tests.parity import tolerances
from equivalence_tests.studies import trajectory

COURSES = {
    "one-cycle of rate and momentum, moving average, smoothing": {
        "optimizer": {"ema_decay": 0.9},
        "schedule": {"cycle_momentum": True},
    },
    "plateau that cuts within a warm-up, early stopping": {
        "epochs": 12,
        "schedule": {
            "schedule": "plateau",
            "plateau_patience": 0,
            "plateau_threshold": 0.2,
            "gamma": 0.5,
            "min_lr": 0.004,
            "warmup_epochs": 10.0,
        },
        "early_stopping": {"patience": 3, "min_delta": 0.1},
    },
}


def assert_same(got: trajectory.Course, expected: trajectory.Course, weights: float):
    assert len(got.losses) == len(expected.losses)
    np.testing.assert_allclose(got.rates, expected.rates, rtol=tolerances.RULES)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=weights)
    for name in ("epochs", "best_epoch", "stopped_early"):
        assert got.report[name] == expected.report[name], name
    np.testing.assert_array_equal(got.confusion, expected.confusion)
    for split, scores in expected.report["splits"].items():
        for name, score in scores.items():
            assert got.report["splits"][split][name] == pytest.approx(score, rel=weights), name
    assert trajectory.distance(got.weights, expected.weights) <= weights


@pytest.mark.parametrize(
    "course", [pytest.param(c, marks=[] if "plateau" in c else pytest.mark.slow) for c in COURSES]
)
def test_a_training_of_120_steps(course):
    got, expected = trajectory.both(trajectory.config(**COURSES[course]))
    assert_same(got, expected, tolerances.TRAINING)
    assert len(got.losses) >= 60
    if "stopping" in course:
        assert got.report["stopped_early"] and np.diff(got.rates).min() < 0


def test_accumulation_over_the_ends_of_epochs():
    """Epochs end between two updates of weights and average; the average begins after a warm-up.

    The running statistics of both are those of the last batch.
    """
    config = trajectory.config(
        epochs=3,
        data={"train_images": 160},
        optimizer={
            "ema_decay": 0.9,
            "ema_after_warmup": True,
            "accumulate_steps": 2,
            "clip_norm": 0.5,
        },
        schedule={"schedule": "cosine", "warmup_epochs": 0.8},  # two updates
        early_stopping={"restore_best": False},  # the best epoch ends before the average begins
    )
    got, expected = trajectory.both(config)
    assert len(got.losses) == 15 and len(set(got.rates)) > 2
    assert_same(got, expected, tolerances.TRAINING)


@pytest.mark.slow
def test_at_a_high_learning_rate():
    got, expected = trajectory.both(trajectory.config(optimizer={"lr": 0.1}))
    assert_same(got, expected, tolerances.TRAINING_FAST)


@pytest.mark.control
@pytest.mark.slow
def test_another_order_of_the_batches_is_seen():
    config = trajectory.config(epochs=4)
    got, _ = trajectory.both(config)
    _, expected = trajectory.both(trajectory.config(epochs=4, seed=1))
    assert trajectory.distance(got.weights, expected.weights) > 1e-3
