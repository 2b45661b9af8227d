"""Processes that make batches ahead of the step, and that end with the process they work for.

Batches come through a pipe: whoever is killed, the kernel takes it back, which it would not do with
named shared memory.
"""

import contextlib
import ctypes
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator

_PIPE_BYTES = 2**20  # the most that Linux gives a pipe of a user
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class WorkerDied(Exception):
    """A process ended before its work did."""

    exit_status = 1


class _InWorker(Exception):
    """The traceback of an error as the process that raised it saw it."""


class InTurn(Iterator):
    """What `count` processes make, one item of each in turn.

    Args:
      make: a function that can be pickled, (number of the process) -> its items.
      count: how many processes.

    Raises:
      WorkerDied: one was killed.
      Exception: whatever `make` raised.
    """

    def __init__(self, make: Callable[[int], Iterable], count: int):
        job = pickle.dumps(make)
        # Signals that are blocked here stay so in a child: Ctrl-C in a terminal goes to all
        # processes, and it is for this one to end the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            self._processes = [_start(number) for number in range(count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.close = weakref.finalize(self, _end, self._processes)
        for process in self._processes:
            threading.Thread(target=_give, args=(process, job), daemon=True).start()
        self._next = 0

    def __next__(self):
        process = self._processes[self._next]
        self._next = (self._next + 1) % len(self._processes)
        try:
            item, error, seen = pickle.load(process.stdout)
        except (EOFError, pickle.UnpicklingError):  # nothing, or a part of an item
            status = process.wait()
            self.close()
            if status == 0:
                raise StopIteration from None
            raise WorkerDied(_death(status)) from None
        if error is not None:
            raise error from _InWorker(seen)
        return item


def _start(number):
    """This file as a program, which imports what its job needs when it reads it."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(number), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with contextlib.suppress(OSError, AttributeError):  # of many pipes, and of other systems
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return process


def _give(process, job):
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(job)


def _end(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        process.stdout.close()


def _death(status):
    if status == -signal.SIGKILL:
        return (
            "a decoding process was killed (signal 9), out of memory perhaps: take fewer"
            " `num_workers`"
        )
    how = f"was killed (signal {-status})" if status < 0 else f"ended with status {status}"
    return f"a decoding process {how}"


def serve():
    """One of the processes: a job from standard input, its items to standard output."""
    number, parent = map(int, sys.argv[1:])
    _end_with(parent)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no item
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        try:
            for item in pickle.load(sys.stdin.buffer)(number):
                _write(out, (item, None, None))
        except BrokenPipeError:
            raise
        except Exception as error:
            _write(out, (None, _that_travels(error), traceback.format_exc()))
    os._exit(0)  # without waiting for threads that read ahead


def _write(out, item):
    pickle.dump(item, out, protocol=pickle.HIGHEST_PROTOCOL)
    out.flush()


def _that_travels(error):
    """Not every exception can be made again from its arguments."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent):
    """Be killed when the parent is, in the middle of a batch too, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(0)


if __name__ == "__main__":
    serve()
