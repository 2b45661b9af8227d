"""When to stop: a value that improves, or does not, from one epoch to the next."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """What has been seen so far; `update` returns the next state and changes nothing."""

    mode: Literal["min", "max"] = "max"
    """Whether less or more is better."""

    patience: int = 0
    """Epochs without improvement before the run stops; 0 never stops it."""

    min_delta: float = 0.0
    """A change must be larger than this to count as an improvement."""

    best: float | None = None
    best_epoch: int | None = None
    bad_epochs: int = 0

    @property
    def stop(self) -> bool:
        return 0 < self.patience <= self.bad_epochs

    def improves(self, value: float) -> bool:
        """Whether `value` beats the best so far; NaN and infinities never do."""
        if not math.isfinite(value) or self.best is None:
            return math.isfinite(value)
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta

    def update(self, value: float, epoch: int) -> "EarlyStopping":
        if self.improves(value):
            return dataclasses.replace(self, best=value, best_epoch=epoch, bad_epochs=0)
        return dataclasses.replace(self, bad_epochs=self.bad_epochs + 1)
