"""The progress of a run, and the signals that end it."""

import dataclasses
import signal
import threading

from flax_resnet.devices import distributed
from flax_resnet.errors import InputError
from flax_resnet.training import optim
from flax_resnet.training.selection import Selection


class Interrupted(distributed.CollectiveError):
    """A signal asked the run to stop; the work is saved."""

    saved = True

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum


@dataclasses.dataclass(kw_only=True)
class Progress:
    """The host's part of the state of a run: plain numbers, saved with every checkpoint."""

    epoch: int = 0
    """Epochs done."""

    step_in_epoch: int = 0
    """Steps done of the next epoch."""

    converted_steps: int = 0
    """Steps of the next epoch that another framework did, which are not timed here."""

    loss_sum: float = 0.0
    """Sum of the losses of these steps, of those that were finite."""

    accuracy_sum: float = 0.0
    """Sum of the accuracies of the same steps."""

    counted_steps: int = 0
    """Number of the same steps."""

    seconds: float = 0.0
    """Time spent on these steps."""

    data_wait: float = 0.0
    """The seconds of training in which the devices had no batch."""

    bad_steps: int = 0
    """Steps in a row whose loss or gradient was not finite."""

    learning_rate: float = 0.0
    """Learning rate of the last step."""

    selection: Selection = Selection()
    """The best epoch, and the state of early stopping."""

    plateau: optim.Plateau = optim.Plateau()
    """State of the plateau schedule."""

    stopped_early: bool = False
    """True if early stopping ended the run."""

    @classmethod
    def from_document(cls, values: dict) -> "Progress":
        """The inverse of `dataclasses.asdict`; missing fields are at their start.

        Raises:
          InputError: a field that this version does not know.
        """
        try:
            selection = Selection(**values.get("selection", {}))
            plateau = optim.Plateau(**values.get("plateau", {}))
            return cls(**values | {"selection": selection, "plateau": plateau})
        except TypeError as error:
            raise InputError(f"the run was begun by another version: {error}") from None

    def count(self, row: dict):
        """Add the metrics of a step to the sums of its epoch."""
        if row["finite"]:
            self.loss_sum += float(row["loss"])
            self.accuracy_sum += float(row["accuracy"])
            self.counted_steps += 1

    def next_epoch(self):
        """Begin the sums anew."""
        self.epoch += 1
        self.step_in_epoch = self.converted_steps = self.counted_steps = 0
        self.loss_sum = self.accuracy_sum = self.seconds = self.data_wait = 0.0


class SignalFlag:
    """The first SIGTERM, SIGHUP or Ctrl-C is noted for the next step boundary, a second one kills
    at once, even within a compilation, where Python's handlers do not run. In a thread nothing is
    noted: signals go to the main one."""

    def __init__(self, *runs):
        self._runs = runs

    def __enter__(self):
        self._old = {s: signal.signal(s, self._note) for s in _signals()}

    def __exit__(self, *exception):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        for run in self._runs:
            run.signum = signum
        for number in self._old:
            signal.signal(number, signal.SIG_DFL)


def _signals():
    if threading.current_thread() is not threading.main_thread():
        return ()
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if under_nohup else (signal.SIGHUP,)))
