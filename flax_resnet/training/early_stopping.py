"""Early stopping as a pure function of what was seen so far."""

import dataclasses
import math

from flax_resnet.config import EarlyStoppingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """What is remembered between two epochs; plain numbers, so that it fits in JSON."""

    best: float | None = None
    """Best value so far."""

    best_epoch: int = 0
    """Epoch of the best value, from 1; 0: none yet."""

    bad_epochs: int = 0
    """Epochs since then."""


def update(
    state: EarlyStopping, value: float, epoch: int, config: EarlyStoppingConfig
) -> tuple[EarlyStopping, bool]:
    """One epoch's value -> new state, and whether to stop.

    An improvement is a change by more than `min_delta`; NaN and infinities are never one.
    """
    if is_improvement(state.best, value, config):
        return EarlyStopping(best=value, best_epoch=epoch), False
    state = dataclasses.replace(state, bad_epochs=state.bad_epochs + 1)
    return state, 0 < config.patience <= state.bad_epochs


def is_improvement(best: float | None, value: float, config: EarlyStoppingConfig) -> bool:
    """Whether `value` beats `best` by more than `min_delta`."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if config.mode == "min" else value - best
    return gain > config.min_delta
