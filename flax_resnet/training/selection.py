"""The choice of the best epoch and early stopping, as pure functions of the watched values."""

import dataclasses
import math

from flax_resnet.config import EarlyStoppingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """State between two epochs; plain numbers, as in JSON."""

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
        return 0 < patience <= self.bad_epochs


def update(state: Selection, value: float, epoch: int, config: EarlyStoppingConfig) -> Selection:
    """The state after an epoch with this value. NaN and infinities are never an improvement."""
    if improves(value, state.best, config.mode):
        state = dataclasses.replace(state, best=value, best_epoch=epoch)
    if improves(value, state.reference, config.mode, config.min_delta):
        return dataclasses.replace(state, reference=value, bad_epochs=0)
    return dataclasses.replace(state, bad_epochs=state.bad_epochs + 1)


def improves(value: float, before: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """True if a value is better than the one before by more than `min_delta`; anything finite is
    better than None."""
    if not math.isfinite(value) or before is None:
        return math.isfinite(value)
    gain = before - value if mode == "min" else value - before
    return gain > min_delta
