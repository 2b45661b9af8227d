"""Faults of learning rate schedules."""

import dataclasses

import jax.numpy as jnp
import optax

from equivalence_tests.mutants.mutant import Mutant
from flax_resnet.training import optim


def _schedule(kind, faulty):
    """Patches that change one kind of schedule."""

    def main(config, lr, updates_per_epoch, total):
        own = _MAIN_SCHEDULE(config, lr, updates_per_epoch, total)
        return faulty(config, lr, total, own) if config.schedule == kind else own

    return [(optim, "_main_schedule", main)]


def _stays_down(config, lr, total, own):
    return lambda step: own(jnp.minimum(step, total))


def _relative_end(config, lr, total, own):
    return _MAIN_SCHEDULE(dataclasses.replace(config, min_lr=config.min_lr * lr), lr, 1, total)


def _optax_one_cycle(config, lr, total, own):
    return optax.cosine_onecycle_schedule(
        total, lr, config.pct_start, config.div_factor, config.final_div_factor
    )


def _late_peak(start, middle, end, pct_start, total):
    return _ONE_CYCLE(start, middle, end, min(pct_start + 1 / total, 0.99), total)


def _plateau(**changes):
    def plateau(state, value, config, lr, mode, warmth=1.0):
        faulty = {name: change(config, lr) for name, change in changes.items()}
        return _PLATEAU(state, value, dataclasses.replace(config, **faulty), lr, mode, warmth)

    return [(optim, "plateau", plateau)]


_MAIN_SCHEDULE, _ONE_CYCLE, _PLATEAU = optim._main_schedule, optim._one_cycle, optim.plateau


def _warm_up_before(config, lr, updates_per_epoch, epochs):
    return _MAKE(dataclasses.replace(config, warmup_within=False), lr, updates_per_epoch, epochs)


def _every_update(config, lr, updates_per_epoch, epochs):
    return _MAKE(dataclasses.replace(config, schedule_per="update"), lr, updates_per_epoch, epochs)


_MAKE = optim.make_schedule

MUTANTS = [
    Mutant(
        name="warm-up before the cosine",
        difference="25b",
        what="the cosine of timm's schedule starts after the warm-up instead of under it",
        patches=[(optim, "make_schedule", _warm_up_before)],
    ),
    Mutant(
        name="rate of every update",
        difference="25c",
        what="a schedule by epochs changes the rate at every update",
        patches=[(optim, "make_schedule", _every_update)],
    ),
    Mutant(
        name="cosine stays down",
        difference="23a",
        what="after its end the cosine stays at 0 instead of rising again",
        patches=_schedule("cosine", _stays_down),
    ),
    Mutant(
        name="cosine ends at a share",
        difference="23b",
        what="the cosine's end is a share of the learning rate instead of a rate",
        patches=_schedule("cosine", _relative_end),
    ),
    Mutant(
        name="Optax's one-cycle",
        difference="24a",
        what="one-cycle is Optax's, one step later throughout",
        patches=_schedule("onecycle", _optax_one_cycle),
    ),
    Mutant(
        name="late peak",
        difference="24b",
        what="one-cycle peaks one step later",
        patches=[(optim, "_one_cycle", _late_peak)],
    ),
    Mutant(
        name="momentum not cycled",
        difference="24c",
        what="one-cycle leaves the momentum alone",
        patches=[(optim, "make_momentum_schedule", lambda *args: None)],
    ),
    Mutant(
        name="plateau one epoch early",
        difference="26a",
        what="the plateau cuts when bad == patience",
        patches=_plateau(plateau_patience=lambda c, lr: max(c.plateau_patience - 1, 0)),
    ),
    Mutant(
        name="no cooldown",
        difference="26b",
        what="the plateau has no cooldown",
        patches=_plateau(plateau_cooldown=lambda c, lr: 0),
    ),
    Mutant(
        name="plateau ends at a share",
        difference="26c",
        what="the plateau's least rate is a share of the learning rate",
        patches=_plateau(min_lr=lambda c, lr: c.min_lr * lr),
    ),
]
