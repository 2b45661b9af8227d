"""Runs commands within the test's process, because a new process takes seconds."""

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flax_resnet.commands import main

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def run_script(name: str, *arguments) -> Outcome:
    """Runs `python scripts/NAME ARGUMENTS...`; exit status, standard output and error."""
    path = str(ROOT / "scripts" / name)
    return _outcome(
        [f"scripts/{name}", *arguments], lambda: runpy.run_path(path, run_name="__main__")
    )


def run_installed(*words) -> Outcome:
    """Runs `flax-resnet WORDS...` as its entry point does; as `run_script` otherwise."""
    return _outcome(["flax-resnet", *words], main.main)


def _outcome(words, call: Callable[[], object]) -> Outcome:
    argv = sys.argv
    out, err = _stream("strict"), _stream("backslashreplace")
    sys.argv = [*map(str, words)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except SystemExit as exit:
        status = exit.code or 0
    finally:
        sys.argv = argv
    return Outcome(status, *(os.fsdecode(stream.buffer.getvalue()) for stream in (out, err)))


def _stream(errors: str) -> io.TextIOWrapper:
    """A stream that encodes as a UTF-8 terminal does."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True)


def train(run_dir, *arguments) -> Outcome:
    """Runs train.py with a small network on few digits, on one device."""
    small = ["--arch", "basic_cnn", "--train-images", 640, "--epochs", 2, "--batch-size", 32]
    small += ["--optimizer", "adam", "--lr", 0.003]
    return run_script("train.py", "--run-dir", run_dir, "--devices", 1, *small, *arguments)


def refused(outcome: Outcome, *words: str):
    """Asserts status 2 and one line on standard error that contains these words."""
    assert outcome.status == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    for word in words:
        assert word in lines[0]
