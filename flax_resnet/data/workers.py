"""Worker processes that make batches ahead of the step and end with their parent process.

Batches come through a pipe, which the kernel removes whichever process is killed; named shared
memory would stay.
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

_PIPE_BYTES = 2**20  # largest pipe that Linux allows a user
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


class WorkerDied(Exception):
    """Raised when a worker process ends before its work is done."""

    exit_status = 1


class _InWorker(Exception):
    """The traceback of an error in a worker process, as text."""


class InTurn(Iterator):
    """An iterator over the items of `count` worker processes, one item of each in turn.

    Args:
      make: a function that can be pickled, (number of the process) -> its items.
      count: number of processes.

    Raises:
      WorkerDied: a process was killed.
      Exception: the error that `make` raised.
    """

    def __init__(self, make: Callable[[int], Iterable], count: int):
        self._make = make  # its arrays are in files of this process, which the others map
        job = pickle.dumps(make)
        # A child inherits blocked signals: Ctrl-C in a terminal goes to all processes, and this one
        # has to end the others.
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
        except (EOFError, pickle.UnpicklingError):  # the pipe ends before or within an item
            status = process.wait()
            self.close()
            if status == 0:
                raise StopIteration from None
            raise WorkerDied(_death(status)) from None
        if error is not None:
            raise error from _InWorker(seen)
        return item


def _start(number):
    """Start this file as a program, which imports its job's modules when it reads the job."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(number), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with contextlib.suppress(OSError, AttributeError):  # too many pipes, or another system
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
            "a decoding process was killed (signal 9), perhaps for lack of memory: take fewer"
            " `num_workers`"
        )
    how = f"was killed (signal {-status})" if status < 0 else f"ended with status {status}"
    return f"a decoding process {how}"


def serve():
    """Run a worker: read a job from standard input and write its items to standard output."""
    number, parent = map(int, sys.argv[1:])
    _end_with(parent)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to stderr, not among the items
    with contextlib.suppress(BrokenPipeError):  # the parent has closed the pipe
        try:
            for item in pickle.load(sys.stdin.buffer)(number):
                _write(out, (item, None, None))
        except BrokenPipeError:
            raise
        except Exception as error:
            _write(out, (None, _picklable(error), traceback.format_exc()))
    os._exit(0)  # does not wait for threads that read ahead


def _write(out, item):
    pickle.dump(item, out, protocol=pickle.HIGHEST_PROTOCOL)
    out.flush()


def _picklable(error):
    """The error, or a RuntimeError with its text if it cannot be pickled and loaded."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent):
    """Let the kernel kill this process when its parent dies, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(0)


if __name__ == "__main__":
    serve()
