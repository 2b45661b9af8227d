"""Turns exceptions into one line and an exit status, in this one place."""

import contextlib
import errno
import os
import tempfile
import traceback
from pathlib import Path

from flax_resnet.text import printable

DONE, FAILED, BAD_INPUT = 0, 1, 2
LOG = "error.log"
"""File in the run directory with the traceback of an unforeseen error."""

_LONGEST = 2000  # characters of a message
FAULTS_OF_PLACE = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO,
)  # fmt: skip
"""Errors of the place that the user named, not of the program."""

_OUT_OF_MEMORY = (
    "out of memory; take a smaller --batch-size, or --accumulate-steps N with the same total, a"
    " smaller --eval-batch-size or --cache none"
)
_SIGNS_OF_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")


class InputError(ValueError):
    """Bad input from the user, such as a file, a setting or a data set. The message is one line,
    which the commands print before they exit with status 2.

    Examples:
      >>> try:
      ...     flax_resnet.create_model("resnet19")
      ... except flax_resnet.InputError as error:
      ...     print(error)
      unknown architecture 'resnet19'; did you mean 'resnet18'?
    """

    exit_status = BAD_INPUT


def extra_needed(what: str, package: str, extra: str) -> InputError:
    """The error that `what` needs a package which an extra of this project installs."""
    return InputError(
        f"{what} needs {package}, which is not installed: `pip install '.[{extra}]'` in the"
        f" project's folder, or `uv run --extra {extra} ...`"
    )


def check_type(name: str, value, kinds: type | tuple[type, ...], what: str):
    """Raise InputError if the argument `name` of a public function is no instance of `kinds`."""
    if not isinstance(value, kinds):
        raise InputError(f"`{name}` is {what}, got {type(value).__name__}")


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit status of an error and the line that is printed for it.

    The traceback of an unforeseen error is written to a file that the line names: in
    `error.run_dir` if the error has this attribute, else in the temporary folder. The attribute
    `error.saved` tells that the run's work is saved.
    """
    status, text = _verdict(error)
    if getattr(error, "saved", False):
        text += "; the work is saved, go on with --resume"
    return status, printable(" ".join(text.split()), _LONGEST)


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk that this one hides, as `torch.save` does."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        error = error.__context__
    return None


def _verdict(error) -> tuple[int, str]:
    status = getattr(error, "exit_status", None)  # exceptions of this project have one
    if status is not None:
        return status, {FAILED: "failed: ", BAD_INPUT: "error: "}.get(status, "") + str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if _is_out_of_memory(error):
        return FAILED, f"failed: {_OUT_OF_MEMORY}"
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
        return BAD_INPUT, f"error: {error}"  # JAX_PLATFORMS names a device that is not here
    if isinstance(error, UnicodeDecodeError):
        return BAD_INPUT, f"error: a file that should be text is not in UTF-8: {error}"
    if isinstance(error, OSError) and error.errno:
        nameless = "the working directory" if error.errno == errno.ENOENT else "disk"
        where = f"{error.filename2 or error.filename or nameless}: {error.strerror}"
        if error.errno in FAULTS_OF_PLACE:
            return BAD_INPUT, f"error: {where}"
        return FAILED, f"failed: {where}"
    if hidden := _full_disk(error):
        return _verdict(hidden)
    what = f"{type(error).__name__}: {error}"  # leaves out the notes that JAX adds
    return FAILED, f"failed: this is a bug: {what}; {_logged(error)}"


def _is_out_of_memory(error) -> bool:
    named = isinstance(error, RuntimeError) and any(s in str(error) for s in _SIGNS_OF_NO_MEMORY)
    return named or isinstance(error, MemoryError)


def _logged(error) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        return f"the traceback is in {_write_log(getattr(error, 'run_dir', None), text)}"
    except OSError:
        return f"no place for a log of the traceback: {text}"


def _write_log(run_dir: Path | str | None, text: str) -> Path:
    """Append to the log in the run directory; write a new one elsewhere if that is impossible."""
    if run_dir is not None:
        with contextlib.suppress(OSError):
            path = Path(run_dir) / LOG
            with open(path, "a", errors="backslashreplace", opener=no_link) as file:
                file.write(text)
            return path
    with tempfile.NamedTemporaryFile(
        "w", errors="backslashreplace", prefix="flax_resnet-", suffix=".log", delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def no_link(path: str, flags: int) -> int:
    """Opener of files in a run directory, where a symbolic link leads to what no run has written;
    a pipe is not waited for."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
