"""Isolation of the tests from the user's working directory, home and caches.

Each test process works in an empty temporary directory, with a temporary home. The plugin
compares the checkout before and after the tests, ignored files included.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_HOME = "FLAX_RESNET_TEST_HOME"
_CACHES = ("__pycache__", ".egg-info")  # Python and its installers write these for any program

OF_THE_USER = (
    "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "TFDS_DATA_DIR", "MPLCONFIGDIR",
)  # fmt: skip
"""Environment variables that name the user's folders; without them all lie in the home."""


def move_home():
    """Give this process and its children a temporary home and caches.

    The processes of pytest-xdist inherit the home of the process that starts them.
    """
    home = os.environ.get(_HOME)
    if home is None:
        home = os.environ[_HOME] = tempfile.mkdtemp(prefix="flax_resnet-tests-")
    os.environ |= {
        "HOME": home,
        "XDG_CACHE_HOME": f"{home}/.cache",
        "XDG_CONFIG_HOME": f"{home}/.config",
        "HYPOTHESIS_STORAGE_DIRECTORY": f"{home}/.hypothesis",
        # The same small programs occur in many files, processes and subprocesses.
        "JAX_COMPILATION_CACHE_DIR": f"{home}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name in OF_THE_USER:
        os.environ.pop(name, None)
    # Without bytecode a command takes three times as long to start: 13 s instead of 4 on one core.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = f"{home}/bytecode"


def remove_home():
    """Remove the temporary home that `move_home` created."""
    shutil.rmtree(os.environ.pop(_HOME), ignore_errors=True)


@contextmanager
def empty_directory(path: Path) -> Iterator[None]:
    """Work in `path`."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


class Checkout:
    """A pytest plugin that fails the session if a file of the checkout was added or changed."""

    def __init__(self, root: Path):
        self.root = root

    def pytest_sessionstart(self):
        """Record the state of the checkout."""
        self.before = files(self.root)

    def pytest_sessionfinish(self, session):
        """Compare the checkout with its state at the start."""
        self.left = sorted(files(self.root) ^ self.before)
        if self.left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """List the files that differ."""
        if self.left:
            terminalreporter.write_line(f"FAILED: the tests changed {', '.join(self.left)}")


def files(root: Path) -> set[str]:
    """Lines of `git status` for new, changed and ignored files, each by itself; empty outside
    git."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--ignored"]
    command += ["--untracked-files=all", "--", ".", ":(exclude).venv"]  # where uv installs
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return {line for line in lines if not any(cache in line for cache in _CACHES)}


def heed_signals():
    """Lets interruptions end programs again where a shell's background job ignores them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
