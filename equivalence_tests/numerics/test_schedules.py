"""Schedules equal torch.optim.lr_scheduler's in float64, to their end and beyond."""

import contextlib
import itertools
import math
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import torch_ref.optim
from equivalence_tests.parity import inputs, tolerances
from flax_resnet.config import ScheduleConfig
from flax_resnet.training import optim

pytestmark = pytest.mark.quick


def label(options: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items())


EPOCHS, UPDATES = 9, 4
PAST = 5

SCHEDULES = [
    dict(schedule="constant"),
    dict(schedule="step", step_epochs=2, gamma=0.3),
    dict(schedule="step", step_epochs=100),
    dict(schedule="multistep", milestones=(1, 5, 6), gamma=0.5),
    dict(schedule="cosine"),
    dict(schedule="cosine", min_lr=0.03),
    dict(schedule="onecycle"),
    dict(schedule="onecycle", pct_start=0.5, div_factor=10.0, final_div_factor=100.0),
    dict(schedule="onecycle", cycle_momentum=True),
    dict(schedule="onecycle", pct_start=0.05),
]
WARMUPS = [{}, dict(warmup_epochs=2.0), dict(warmup_epochs=0.75, warmup_factor=0.5)]


def torch_course(options: dict, updates=UPDATES) -> np.ndarray:
    """[steps, 2]: learning rate and momentum of every update, up to PAST updates after the end."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4, momentum=0.9)
    config = ScheduleConfig(**options)
    scheduler, _ = torch_ref.optim.make_schedulers(optimizer, config, updates, EPOCHS)
    course = []
    with contextlib.suppress(ValueError):  # OneCycleLR ends with its last step
        for _ in range(round(EPOCHS * updates) + PAST):
            group = optimizer.param_groups[0]
            course.append((group["lr"], group["momentum"]))
            optimizer.step()
            scheduler.step()
    return np.array(course)


def jax_course(options: dict, num_steps: int, updates=UPDATES) -> np.ndarray:
    config = ScheduleConfig(**options)
    rate = optim.make_schedule(config, 0.4, updates, EPOCHS)
    momentum = optim.make_momentum_schedule(config, updates, EPOCHS) or (lambda step: 0.9)
    return np.array([(rate(step), momentum(step)) for step in jnp.arange(num_steps)])


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("warmup", WARMUPS, ids=label)
@pytest.mark.parametrize("options", SCHEDULES, ids=label)
def test_schedules_to_their_end_and_beyond(options, warmup, x64):
    for updates in (UPDATES, 3.5, 0.4):
        expected = torch_course(options | warmup, updates)
        assert len(expected) >= round(EPOCHS * updates)
        if options["schedule"] != "onecycle":
            assert len(expected) == round(EPOCHS * updates) + PAST
        got = jax_course(options | warmup, len(expected), updates)
        np.testing.assert_allclose(got, expected, rtol=tolerances.RULES, atol=1e-18)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("options", SCHEDULES[3:7], ids=label)
@pytest.mark.parametrize("warmup", WARMUPS[:2], ids=label)
def test_schedules_by_epochs(options, warmup, x64):
    options = options | warmup | {"schedule_per": "epoch"}
    for updates in (UPDATES, 3.5, 1):
        expected = torch_course(options, updates)
        got = jax_course(options, len(expected), updates)
        np.testing.assert_allclose(got, expected, rtol=tolerances.RULES, atol=1e-18)
        changes = np.flatnonzero(np.diff(expected[:, 0])) + 1
        assert len(changes) and (changes % updates < 1).all()


@pytest.mark.parametrize("per", ["update", "epoch"])
@pytest.mark.parametrize("min_lr", [0.0, 0.03])
def test_a_warmup_within_the_cosine(per, min_lr, x64):
    options = dict(schedule="cosine", warmup_epochs=2.0, warmup_within=True, schedule_per=per)
    expected = torch_course(options | {"min_lr": min_lr})
    got = jax_course(options | {"min_lr": min_lr}, len(expected))
    np.testing.assert_allclose(got, expected, rtol=tolerances.RULES, atol=1e-18)


def test_a_warmup_within_the_cosine_is_timms(x64):
    timm = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = timm.CosineLRScheduler(
        optimizer, t_initial=EPOCHS, lr_min=0.001, warmup_t=3, warmup_lr_init=0.004
    )
    expected = []
    for epoch in range(EPOCHS):
        expected += [optimizer.param_groups[0]["lr"]] * UPDATES
        schedule.step(epoch + 1)
    options = dict(schedule="cosine", warmup_epochs=3.0, warmup_within=True, min_lr=0.001)
    got = jax_course(options | {"schedule_per": "epoch"}, len(expected))[:, 0]
    np.testing.assert_allclose(got, expected, rtol=tolerances.RULES)


def optax_cosine(config, lr, updates_per_epoch, total):
    return optax.cosine_decay_schedule(lr, total)


def optax_onecycle(config, lr, updates_per_epoch, total):
    return optax.cosine_onecycle_schedule(total, lr, config.pct_start)


@pytest.mark.control
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize(
    "options, wrong",
    [(dict(schedule="cosine"), optax_cosine), (dict(schedule="onecycle"), optax_onecycle)],
    ids=["cosine", "onecycle"],
)
def test_optaxs_own_schedules_differ(options, wrong, x64):
    expected = torch_course(options)
    with mock.patch.object(optim, "_main_schedule", wrong):
        assert np.abs(jax_course(options, len(expected)) - expected).max() > 1e-5


NAN = float("nan")
COURSES = {
    "falls and stays": [1.0, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7],
    "within the threshold": [1.0 - 3e-5 * i for i in range(14)],
    "negative": [-1.0, -1.00001, -1.2, -1.2, -1.1, -1.1, -1.3, -1.3, -1.3, -1.3],
    "not a number": [NAN, 1.0, NAN, NAN, NAN, 0.9, NAN, NAN, NAN, NAN],
    "infinite": [math.inf, 1.0, math.inf, math.inf, math.inf, 0.5, 0.5, 0.5],
    "zero": [0.0] * 8,
    "walk": list(inputs.random_numbers().standard_normal(60).cumsum()),
}
PLATEAUS = [
    dict(plateau_patience=p, plateau_cooldown=c, min_lr=m, plateau_threshold=t)
    for p, c, m, t in itertools.product((0, 1, 3), (0, 2), (0.0, 0.05), (1e-4, 0.1))
] + [
    dict(gamma=0.01, plateau_patience=0),
    dict(plateau_patience=0, warmup_epochs=3.5),
    dict(plateau_patience=0, warmup_epochs=3.0, schedule_per="epoch"),
    dict(plateau_patience=0, warmup_epochs=6.0, warmup_factor=0.1, min_lr=0.03, gamma=0.5),
]


def torch_cuts(options: dict, mode: str, values: list) -> list[float]:
    """The learning rate after each epoch of `UPDATES` updates."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    config = ScheduleConfig(schedule="plateau", **options)
    warmup, plateau = torch_ref.optim.make_schedulers(optimizer, config, UPDATES, len(values), mode)
    seen = []
    for value in values:
        for _ in range(UPDATES):
            optimizer.step()
            warmup.step()
        plateau.step(value)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def jax_cuts(options: dict, mode: str, values: list) -> list[float]:
    config = ScheduleConfig(schedule="plateau", **options)
    state, seen = optim.Plateau(), []
    for epoch, value in enumerate(values, 1):
        warmth = optim.warmth(config, epoch * UPDATES, UPDATES)
        state = optim.plateau(state, value, config, 0.4, mode, warmth)
        seen.append(state.lr * warmth)
    return seen


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("values", COURSES.values(), ids=COURSES)
def test_plateau(values, mode):
    for options in PLATEAUS:
        expected = torch_cuts(options, mode, values)
        np.testing.assert_allclose(
            jax_cuts(options, mode, values), expected, rtol=tolerances.RULES, err_msg=str(options)
        )


@pytest.mark.control
def test_the_courses_cut_and_a_patience_off_by_one_is_seen():
    for name, values in COURSES.items():
        options = dict(plateau_patience=1)
        expected = torch_cuts(options, "min", values)
        assert expected[-1] < 0.4, name
        assert jax_cuts(dict(plateau_patience=0), "min", values) != pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(schedule="step", step_epochs=100_000),
        dict(schedule="multistep", milestones=(1, 100_000)),
        dict(schedule="cosine", warmup_epochs=100_000),
        dict(schedule="onecycle", warmup_epochs=100_000, cycle_momentum=True),
    ],
    ids=label,
)
def test_lengths_beyond_32_bits_are_never_reached(options):
    """40,000 updates per epoch make 4 billion, more than an int32 step count can hold."""
    config = ScheduleConfig(**options)
    schedule = optim.make_schedule(config, 0.4, 40_000, 50_000)
    momentum = optim.make_momentum_schedule(config, 40_000, 50_000) or schedule
    for update in (0, 2 * 10**9):
        update = jnp.asarray(update, jnp.int32)
        assert jnp.isfinite(schedule(update)) and jnp.isfinite(momentum(update))
