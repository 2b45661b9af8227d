"""What the host knows of a run, and how one ends before its time."""

import dataclasses
import signal
import threading

from flax_resnet.devices import distributed
from flax_resnet.training.early_stopping import EarlyStopping


class NonFiniteLoss(distributed.Everywhere):
    """The loss, the gradient or what a network gives is no longer a number."""

    exit_status = 1


class Interrupted(distributed.Everywhere):
    """A signal asked the run to stop; the work is saved."""

    saved = True

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What the host knows of a run; plain numbers, saved with every checkpoint."""

    epoch: int = 0
    """Epochs done."""

    step_in_epoch: int = 0
    """Steps done of the next one."""

    loss_sum: float = 0.0
    """Of these steps."""

    accuracy_sum: float = 0.0
    """Of these steps."""

    seconds: float = 0.0
    """Spent on these steps."""

    data_wait: float = 0.0
    """Seconds of these in which the devices had no batch."""

    counted_steps: int = 0
    """Of these steps, those with a finite loss."""

    bad_steps: int = 0
    """Steps in a row whose loss or gradient was not finite."""

    learning_rate: float = 0.0
    """Of the last step."""

    stopping: dict = dataclasses.field(default_factory=lambda: dataclasses.asdict(EarlyStopping()))
    """Early stopping's state."""

    best: float | None = None
    """Best value of what is monitored."""

    best_epoch: int = 0
    """Its epoch, from 1; 0: none yet."""

    plateau: dict = dataclasses.field(default_factory=dict)
    """The plateau schedule's state."""

    stopped_early: bool = False
    """Whether early stopping ended the run."""


class SignalFlag:
    """The first SIGTERM, SIGHUP or Ctrl-C is noted for the next step boundary, a second one kills
    at once, even within a compilation, where Python's handlers do not run. In a thread nothing is
    noted: signals go to the main one."""

    def __init__(self, run):
        self._run = run

    def __enter__(self):
        self._old = {s: signal.signal(s, self._note) for s in _signals()}

    def __exit__(self, *exception):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        self._run.signum = signum
        for number in self._old:
            signal.signal(number, signal.SIG_DFL)


def _signals():
    if threading.current_thread() is not threading.main_thread():
        return ()
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if under_nohup else (signal.SIGHUP,)))
