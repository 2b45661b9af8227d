"""The choice of the best epoch and early stopping, as pure functions of the watched values."""

import dataclasses
import math

from flax_resnet.config import EarlyStoppingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """State between two epochs."""

    best: float | None = None
    """Best value so far, by however little."""

    best_epoch: int = 0
    """Epoch of the best value, from 1; 0 before there is one."""

    reference: float | None = None
    """Last value that was better than the one before it by more than `min_delta`."""

    bad_epochs: int = 0
    """Epochs since the reference."""

    def should_stop(self, patience: int) -> bool:
        """True if the patience is exhausted; a patience of 0 never is."""
        return patience > 0 and self.bad_epochs >= patience


def update(state: Selection, value: float, epoch: int, config: EarlyStoppingConfig) -> Selection:
    """The state after an epoch with this value."""
    changes = {"bad_epochs": state.bad_epochs + 1}
    if improves(value, state.reference, config.mode, config.min_delta):
        changes = {"bad_epochs": 0, "reference": value}
    if improves(value, state.best, config.mode):
        changes |= {"best": value, "best_epoch": epoch}
    return dataclasses.replace(state, **changes)


def improves(value: float, before: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """True if a value is better than the one before by more than `min_delta`; NaN and infinities
    never are."""
    if not math.isfinite(value):
        return False
    higher = 1 if mode == "max" else -1
    return before is None or higher * (value - before) > min_delta
