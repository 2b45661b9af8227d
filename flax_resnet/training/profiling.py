"""A trace of some training steps, as TensorBoard's and XProf's profile viewers open it."""

import contextlib
from pathlib import Path

import jax

_FIRST = 2  # dispatches before the trace; the first compiles


class Profiler:
    """Traces `steps` steps of a training once; 0 steps are none."""

    def __init__(self, folder: Path, steps: int):
        self._folder, self._dispatches, self._running = folder, 0, False
        self.left = steps

    @contextlib.contextmanager
    def dispatch(self, step: int, count: int, in_flight: list):
        """A context for the dispatch of `count` steps, which begin with number `step`. The trace
        begins after all work in flight and ends after the last of its steps has run."""
        self._dispatches += 1
        if self.left and self._dispatches == _FIRST + 1:
            jax.block_until_ready(in_flight)
            jax.profiler.start_trace(self._folder)
            self._running = True
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self.left = max(0, self.left - count)
        if not self.left:
            jax.block_until_ready(in_flight)
            self.close()

    def close(self):
        """End the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
