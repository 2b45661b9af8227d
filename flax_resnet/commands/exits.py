"""The end of a command: signals, closed streams, one line of an error, the exit status."""

import codecs
import contextlib
import os
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Callable
from pathlib import Path

from flax_resnet import errors, text
from flax_resnet.commands import cli
from flax_resnet.errors import DONE, FAILED
from flax_resnet.runs.display import drop_output


class CheckFailed(Exception):
    """A check of the command failed; the exit status is 1."""

    exit_status = FAILED


class Stopped(KeyboardInterrupt):
    """A signal ended a command that has nothing to save."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.exit_status = signum, 128 + signum


class NoReader(Exception):
    """Nobody reads standard output, to which alone the command writes: its work is done."""

    exit_status = DONE


def run_command(main: Callable[[], int | None]) -> typing.NoReturn:
    """Call a command's main and end the process with the exit status of its outcome."""
    _open_closed_streams()
    sys.stdout.reconfigure(errors=_BYTES_OR_ESCAPED)  # names of files are bytes, UTF-8 or not
    out, err = _Stream(sys.stdout), _Stream(sys.stderr)
    with _ended_by_signals(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status, line = _outcome(main)
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            status, line = errors.verdict(error)
    if line:
        with contextlib.suppress(OSError):  # stderr has no reader
            text.say(line, file=sys.stderr)
    sys.exit(status)


class _Stream:
    """A standard stream whose output is dropped when nobody reads it: what else a command does
    goes on, as after `| head -1`."""

    def __init__(self, stream: typing.TextIO):
        self._stream, self.is_read = stream, True

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or 0

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *arguments):
        try:
            return function(*arguments)
        except BrokenPipeError:
            self.is_read = False
            drop_output(self._stream)


def check_read():
    """Raises NoReader if the reader of standard output has closed it; for commands that write long
    results nowhere else."""
    if not getattr(sys.stdout, "is_read", True):
        raise NoReader


@contextlib.contextmanager
def _ended_by_signals():
    """Inside the context SIGTERM and SIGHUP raise `Stopped`, as Ctrl-C raises KeyboardInterrupt, so
    that child processes are ended and one line is printed. A second signal kills at once. A running
    training has handlers of its own, which save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as it was during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {n: handler for n in numbers if (handler := signal.getsignal(n)) == signal.SIG_DFL}

    def stop(signum, frame):
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(signum)

    try:
        for number in before:
            signal.signal(number, stop)
        with _sent_again(lambda number: number in before and signal.signal(number, stop)):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _sent_again(restore: Callable[[int], object]):
    """Inside the context a signal is sent again if Python drops the exception of its handler, as it
    does in callbacks of the garbage collector, of which JAX has one.

    Args:
      restore: (number of a signal) -> None; puts the signal's handler back before it is sent.
    """
    timers, dropped, thread = [], sys.unraisablehook, threading.get_ident()
    is_active = True

    def hook(unraisable):
        if not is_active or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            return dropped(unraisable)
        signum = getattr(unraisable.exc_value, "signum", signal.SIGINT)
        restore(signum)
        timers.append(threading.Timer(0.1, signal.pthread_kill, (thread, signum)))
        timers[-1].daemon = True
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        is_active = False
        if sys.unraisablehook is hook:  # otherwise a hook that was set later has to stay
            sys.unraisablehook = dropped
        for timer in timers:
            timer.cancel()


def _outcome(main) -> tuple[int, str]:
    try:
        return main() or DONE, ""
    except SystemExit as left:  # argparse has printed its help
        return left.code or DONE, ""
    except (Exception, KeyboardInterrupt) as error:
        status, line = errors.verdict(error)
        return status, cli.as_flags(line)


def leave(status: int, line: str) -> typing.NoReturn:
    """End the process with a line on stderr and an exit status."""
    text.say(line, file=sys.stderr)
    sys.exit(status)


def _bytes_or_escaped(error: UnicodeEncodeError):
    """Encode an undecodable byte of a file name as itself, any other character as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


_BYTES_OR_ESCAPED = "bytes or escaped"


codecs.register_error(_BYTES_OR_ESCAPED, _bytes_or_escaped)


def _open_closed_streams():
    """Open standard streams that the caller has closed on /dev/null; otherwise the next opened file
    would get their descriptor."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(1, "w")
    sys.stderr = sys.stderr or open(2, "w")


def other_command(name: str, words: list[str]) -> str:
    """The command line of another subcommand, called as this one was: installed or as a script."""
    if sys.argv[0].startswith("flax-resnet "):
        return shlex.join(["flax-resnet", name, *words])
    return shlex.join(["python", f"scripts/{name.replace('-', '_')}.py", *words])


def command_line() -> str:
    """The command line of this process, without the path of the project."""
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *sys.argv[1:]])
    if sys.argv[0].startswith("flax-resnet "):  # a subcommand of the installed program
        return f"{sys.argv[0]} {shlex.join(sys.argv[1:])}".rstrip()
    script = Path(sys.argv[0])
    name = f"scripts/{script.name}" if script.parent.name == "scripts" else sys.argv[0]
    return shlex.join(["python", name, *sys.argv[1:]])
