"""What the tests must leave alone: the user's working directory, home and caches.

Each test process works in an empty temporary directory, with a temporary home. The plugin then
compares the checkout before and after, ignored files included.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_HOME = "FLAX_RESNET_TEST_HOME"
_CACHES = ("__pycache__", ".egg-info")  # Python and its installers write these for any program


def move_home():
    """Give this process, and those that it starts, a temporary home and caches.

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
    }


def remove_home():
    """Remove what `move_home` has made."""
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
    """A pytest plugin: the tests fail where they have added or changed a file of the checkout."""

    def __init__(self, root: Path):
        self.root = root

    def pytest_sessionstart(self):
        """Note what is there."""
        self.before = files(self.root)

    def pytest_sessionfinish(self, session):
        """Compare."""
        self.left = sorted(files(self.root) ^ self.before)
        if self.left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Say what differs."""
        if self.left:
            terminalreporter.write_line(f"FAILED: the tests changed {', '.join(self.left)}")


def files(root: Path) -> set[str]:
    """The lines of `git status` of what is new, changed or ignored; empty outside git."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--ignored"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return {line for line in lines if not any(cache in line for cache in _CACHES)}
