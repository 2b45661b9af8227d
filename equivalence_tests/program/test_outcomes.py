"""Ends of a command: errors, exit status, output that is closed, full disks."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from equivalence_tests.program.command import ROOT, refused, run_installed, run_script, train
from equivalence_tests.program.insects import write_folder
from flax_resnet import errors
from flax_resnet.commands import exits, main, predict
from flax_resnet.data.workers import WorkerDied
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.runs import checkpoint
from flax_resnet.runs.display import Display, drop_output
from flax_resnet.runs.views import warn
from flax_resnet.training.guard import NonFiniteLoss
from flax_resnet.training.progress import Interrupted


def test_too_little_memory_is_one_line(capsys):
    def main():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with pytest.raises(SystemExit) as left:
        exits.run_command(main)
    error = capsys.readouterr().err
    assert left.value.code == 1 and error.count("\n") == 1
    assert all(word in error for word in ("out of memory", "--batch-size", "--accumulate-steps"))


def no_place(number):
    return OSError(number, os.strerror(number), "runs/a")


@pytest.mark.parametrize(
    "error,status,words",
    [
        (InputError("a\nb \x1b[1m\u202e"), 2, r"error: a b \x1b[1m\u202e"),
        (exits.CheckFailed("no"), 1, "failed: no"),
        (NonFiniteLoss("step 3"), 1, "failed: step 3"),
        (Interrupted(signal.SIGHUP), 129, "SIGHUP; the work is saved, go on with --resume"),
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError(), 1, "--cache none"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, "out of memory"),
        (no_place(errno.EDQUOT), 2, "error: runs/a: Disk quota exceeded"),
        (no_place(errno.EIO), 2, "error: runs/a: Input/output error"),
        (no_place(errno.EMFILE), 1, "Too many open files"),
        (no_place(errno.ENOLCK), 1, "No locks available"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not in UTF-8"),
        (no_place(errno.EPIPE), 1, "Broken pipe"),
        (WorkerDied("killed"), 1, "failed: killed"),
        (RuntimeError("Unable to initialize backend 'cuda': no"), 2, "error: Unable"),
    ],
)
def test_every_error_is_a_line_and_a_status(capsys, error, status, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        exits.run_command(main)
    line = capsys.readouterr().err
    assert left.value.code == status and words in line and line.count("\n") == 1


SWALLOWS = """
import gc, os, signal, time
from flax_resnet.commands import exits

def main():
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.{})

    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(5)

exits.run_command(main)
"""


@pytest.mark.parametrize(
    "name,status,line",
    [
        ("SIGTERM", 143, "stopped by SIGTERM"),
        ("SIGHUP", 129, "stopped by SIGHUP"),
        ("SIGINT", 130, "stopped"),
    ],
)
def test_a_signal_amid_the_garbage_collection_ends_the_command(name, status, line):
    """Python drops exceptions in callbacks of the collector."""
    program = [sys.executable, "-c", SWALLOWS.format(name)]
    outcome = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (status, line + "\n")


def test_an_error_of_replacing_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError) as error, replacing(tmp_path):
        pass
    assert errors.verdict(error.value) == (2, f"error: {tmp_path}: Is a directory")


def test_a_working_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(OSError) as error:
        Path.cwd()
    assert errors.verdict(error.value)[1].startswith("failed: the working directory: No such")


def test_a_variable_that_JAX_refuses_is_bad_input(monkeypatch):
    """JAX reads its variables when a command imports it."""
    word = "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"
    monkeypatch.setattr(main.importlib, "import_module", mock.Mock(side_effect=ValueError(word)))
    refused(run_installed("evaluate", "run"), "a variable of the environment", word)


def test_an_unknown_backend_of_matplotlib_does_not_end_a_command(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "nothing")
    assert run_installed("compare", "--help").status == 0
    assert "MPLBACKEND" not in os.environ


@pytest.mark.parametrize("in_a_run", [True, False])
def test_an_error_that_nobody_has_foreseen_is_a_line_and_a_log(tmp_path, monkeypatch, in_a_run):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    error = jax.errors.JaxRuntimeError("INTERNAL: a fault of the program")
    error.add_note("what JAX adds")
    if in_a_run:
        error.run_dir = tmp_path
    status, line = errors.verdict(error)
    (log,) = tmp_path.iterdir()
    assert (
        status == 1
        and "this is a bug: JaxRuntimeError: INTERNAL" in line
        and str(log) in line
        and "\n" not in line
    )
    assert "a fault of the program" in log.read_text()
    assert (log.name == errors.LOG) == in_a_run


def piped(*arguments, shell: str) -> subprocess.CompletedProcess:
    """Runs a shell command line in which "$@" is `python scripts/train.py ARGUMENTS`."""
    command = [sys.executable, "scripts/train.py", *map(str, arguments)]
    line = ["bash", "-o", "pipefail", "-c", shell, "bash", *command]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("shell", ['"$@" | head -1', '"$@" >&- 2>&-'])
def test_a_closed_pipe_is_no_error(shell):
    outcome = piped("--list-recipes", shell=shell)
    assert (outcome.returncode, outcome.stderr) == (0, "")


@contextlib.contextmanager
def unread():
    """Standard output and error are pipes that nobody reads."""
    with contextlib.ExitStack() as closing:
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            reader, writer = os.pipe()
            os.close(reader)
            stream = closing.enter_context(open(writer, "w"))
            closing.callback(drop_output, stream)
            closing.enter_context(redirect(stream))
        yield


def test_a_command_goes_on_when_nobody_reads_it():
    done = []

    def main():
        print("a line", flush=True)
        warn("a warning that nobody reads")
        print("x" * 100_000, file=sys.stderr, flush=True)
        done.append("the work after the lines")
        return 1

    with pytest.raises(SystemExit) as left, unread():
        exits.run_command(main)
    assert (left.value.code, done) == (1, ["the work after the lines"])


@pytest.mark.parametrize("to_a_file", [True, False])
def test_predictions_go_on_without_a_reader_only_to_a_file(tmp_path, to_a_file):
    asked = []

    def rows():
        for number in range(1000):
            asked.append(number)
            yield {"image": "a" * 100, "error": "broken"}

    table = tmp_path / "table.csv"
    with pytest.raises(SystemExit) as left, unread():
        table = table if to_a_file else None
        exits.run_command(lambda: predict.write_all(rows(), Path("-"), table))
    assert left.value.code == (1000 if to_a_file else 0)  # images left out
    assert len(asked) == 1000 if to_a_file else len(asked) < 1000
    assert not to_a_file or len(table.read_text().splitlines()) == 1001


def test_a_training_goes_on_without_its_output(tmp_path):
    flags = ["--smoke", "--arch", "basic_cnn", "--run-dir", tmp_path / "run"]
    outcome = piped(*flags, shell='"$@" | head -1')
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome
    assert outcome.stdout and (tmp_path / "run" / "report.json").exists()


def test_output_that_cannot_be_written_is_a_failure_unless_something_is_trained(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise no_place(errno.ENOSPC)

    dropped = []
    monkeypatch.setattr("flax_resnet.runs.display.drop_output", dropped.append)
    display = Display(Console(file=Full()))
    with pytest.raises(OSError):
        display.say("a table")
    display.start(total_steps=1, done_steps=0, batch_size=1)
    display.say("epoch 1")
    display.say("epoch 2")
    assert len(dropped) == 1


def test_what_steers_a_terminal_is_escaped_in_lines_and_tables():
    file = io.StringIO()
    display = Display(Console(file=file, soft_wrap=True, width=80))
    table = Table("class")
    table.add_row("b\x1b[2Jee\u202e")
    display.say("left out: a\x1b[31m \x07[red].png \udce9")
    display.show(table)
    out = file.getvalue()
    assert "\x1b" not in out and "\u202e" not in out
    assert r"left out: a\x1b[31m" in out and "[red].png \udce9" in out
    assert r"b\x1b[2Jee\u202e" in out


def test_a_terminal_without_a_character_shows_its_code(monkeypatch):
    class Ascii(io.TextIOWrapper):
        def close(self):
            pass

    out = Ascii(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as left:
        exits.run_command(lambda: print("caf\xe9 \udce9"))
    assert not left.value.code and out.buffer.getvalue() == b"caf\\xe9 \xe9\n"


def test_a_real_process_says_the_same():
    command = [sys.executable, "scripts/train.py", "--arch", "resnet19"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and "did you mean" in outcome.stderr


NO_PASSWD = """
import pwd

def no_entry(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = no_entry
"""


@pytest.fixture(scope="module")
def trained_without_a_home(tmp_path_factory):
    """A training with decoding processes by a user without a home and an entry in passwd: the
    folder in which it was started, and its outcome."""
    folder = tmp_path_factory.mktemp("no_home")
    data = write_folder(folder / "data", per_class=4)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NO_PASSWD)
    (folder / "here").mkdir()
    hidden = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    command = [sys.executable, ROOT / "scripts/train.py", "--arch", "basic_cnn", "--epochs", "1"]
    command += ["--dataset", f"folder:{data}", "--batch-size", "2", "--run-dir", "run"]
    command += ["--num-workers", "2", "--cache", "none", "--devices", "1"]
    command += ["--validation-fraction", "0"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder / "here",
        env=variables | {"PYTHONPATH": path},
    )
    return folder / "here", done


def test_a_user_without_a_home_can_train(trained_without_a_home):
    here, done = trained_without_a_home
    assert done.returncode == 0, done.stderr
    assert [path.name for path in here.iterdir()] == ["run"]
    assert (here / "run" / "curves.png").exists()


def test_a_run_with_decoding_processes_ends_without_a_word(trained_without_a_home):
    assert trained_without_a_home[1].stderr == ""


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of a few megabytes."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # a writer may end late


def test_a_disk_too_small_is_told_before_anything_is_written(tiny_disk):
    refused(train(tiny_disk / "run"), "no space left", "MB")
    assert not list(tiny_disk.iterdir())


def test_a_resumed_run_needs_no_room_for_the_checkpoint_that_it_replaces(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    state = np.zeros(1000, np.float32)
    with pytest.raises(InputError, match="no space left"):
        checkpoint.check_space(tmp_path, state)
    checkpoint.check_space(tmp_path, state, kept=1)
    usage.free = 3000
    with pytest.raises(InputError, match="no space left"):
        checkpoint.check_space(tmp_path, state, kept=2)


def test_a_disk_that_fills_up_is_told_in_one_line(tiny_disk, monkeypatch):
    monkeypatch.setattr("flax_resnet.training.fit.check_space", lambda *_: None)
    refused(train(tiny_disk / "run"), "no space left")


@pytest.mark.parametrize(
    "script,flag", [("evaluate.py", "--json"), ("predict.py", "--json"), ("predict.py", "--csv")]
)
def test_where_nothing_can_be_written_is_told_first(tmp_path, script, flag):
    """The output is checked before the run, which does not exist here."""
    inputs = ["image.png"] if script == "predict.py" else []
    for place, words in (
        (tmp_path / "gone" / "out", "gone does not exist"),
        (tmp_path, "is a dir"),
    ):
        refused(run_script(script, tmp_path, *inputs, flag, place), flag, words)


def test_a_run_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refused(train(tmp_path / "file" / "sub"), "file/sub", "Not a directory")
