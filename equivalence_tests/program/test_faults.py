"""Killed and stopped runs resume to the same bits; signals; failing saves.

`python -m equivalence_tests.studies.faults` is the long version with 35 processes.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivalence_tests.program.command import run_script
from equivalence_tests.program.test_train import EVERYTHING, digest, quiet, small, weights
from equivalence_tests.studies import faults
from equivalence_tests.studies.faults import ROOT
from flax_resnet.commands import exits
from flax_resnet.devices import distributed
from flax_resnet.errors import InputError
from flax_resnet.runs import checkpoint
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.training import loop, restore
from flax_resnet.training.fit import fit
from flax_resnet.training.progress import Interrupted, SignalFlag


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run and its fingerprint."""
    run_dir = tmp_path_factory.mktemp("faults") / "straight"
    return SimpleNamespace(run_dir=run_dir, fingerprint=faults.straight(run_dir)[0])


def test_a_run_killed_inside_a_save_comes_back_to_the_same_bits(straight, tmp_path):
    row = faults.survive(tmp_path / "run", faults.in_save(2), signal.SIGKILL, straight.fingerprint)
    assert row["status"] == -signal.SIGKILL
    assert row["phase"] == "save" and row["resumed_from"] > 0 and not row["different"], row


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_comes_back_to_the_same_bits(straight, tmp_path):
    row = faults.survive(
        tmp_path / "run", faults.after(3, 0.05), signal.SIGTERM, straight.fingerprint
    )
    assert row["status"] == 128 + signal.SIGTERM
    assert row["resumed_from"] > 0 and not row["different"], row


@pytest.mark.control
def test_one_bit_of_an_average_is_noticed(straight, monkeypatch):
    """Negative control: the fingerprint changes with a single bit."""
    original = restore.restore

    def one_bit_off(*arguments):
        *rest, state = original(*arguments)
        bias = state.ema["fc"]["bias"]
        state.ema["fc"]["bias"] = np.nextafter(bias, np.float32("inf"))
        return *rest, state

    monkeypatch.setattr(restore, "restore", one_bit_off)
    changed = faults.fingerprint(straight.run_dir)
    assert [n for n in changed if changed[n] != straight.fingerprint[n]] == ["state"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_second_signal_kills_at_once(signum):
    run = SimpleNamespace(signum=None)
    before = signal.getsignal(signum)
    with SignalFlag(run):
        os.kill(os.getpid(), signum)
        assert run.signum == signum
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_a_line_and_leaves_nothing(tmp_path, monkeypatch, signum):
    monkeypatch.setattr(
        "flax_resnet.training.fit.prepare", lambda config: os.kill(os.getpid(), signum)
    )
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    outcome = run_script("train.py", "--run-dir", tmp_path / "run")
    assert (outcome.status, outcome.err) == (128 + signum, f"stopped by {signum.name}\n")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)] == handlers
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_exception_of_a_signal_is_swallowed_while_devices_are_looked_for(monkeypatch, signum):
    """JAX's search for plugins catches every exception."""
    seen = []
    monkeypatch.setattr(jax, "devices", lambda: seen.append(signal.getsignal(signum)))
    before = signal.signal(signum, lambda number, frame: None)
    try:
        handler = signal.getsignal(signum)
        with distributed.joined(None, None, None, timeout=1):
            assert seen == [signal.SIG_DFL] and signal.getsignal(signum) == handler
        signal.signal(signum, signal.SIG_IGN)  # as nohup does with SIGHUP
        with distributed.joined(None, None, None, timeout=1):
            assert seen[1:] == [signal.SIG_IGN] == [signal.getsignal(signum)]
    finally:
        signal.signal(signum, before)


def test_a_process_that_is_stopped_while_it_begins_leaves_without_the_others(monkeypatch):
    """Python's own exit would wait for them in a barrier."""
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_leave", lambda *words: left.append(words))
    with distributed.joined(None, None, None, timeout=1):
        raise exits.Stopped(signal.SIGTERM)
    assert left == [(143, "stopped by SIGTERM")]


def test_a_lost_connection_is_no_fault_of_the_disk():
    assert checkpoint._fault_of_the_disk("Gloo: Connection reset by peer") is None
    assert checkpoint._fault_of_the_disk("No space left on device") == errno.ENOSPC


def test_ctrl_c_amid_the_imports_is_no_traceback():
    """Ctrl-C comes while a command imports its first module, `memory`."""
    code = "import os, signal; from flax_resnet.commands import memory;"
    code += "os.kill(os.getpid(), signal.SIGINT); print('survived')"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (-signal.SIGINT, "", "")


def test_under_nohup_the_end_of_the_terminal_is_none_of_the_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalFlag(SimpleNamespace(signum=None)):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_a_thread_leaves_signals_to_the_main_one():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def within():
        with SignalFlag(SimpleNamespace(signum=None)):
            return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(within).result() == handlers


def broken_at(step, monkeypatch, where):
    """Make the next training fail at this step, or in the validation after it."""
    original = getattr(loop, where)

    def failing(run, *arguments):
        if run.global_step >= step:
            raise RuntimeError("a fault of the program")
        return original(run, *arguments)

    monkeypatch.setattr(loop, where, failing)


def test_processes_of_a_group_are_counted_until_they_end():
    parent = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    assert len(faults.group_of(process.pid)) == 2
    process.kill()
    process.wait()
    (left,) = faults.group_of(process.pid)
    os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize(
    "where", ["_next_batches", pytest.param("_validate", marks=pytest.mark.slow)]
)
def test_a_run_that_fails_is_saved_and_ends_the_same(tmp_path, monkeypatch, where):
    """The run fails within an epoch or in its validation, with steps not yet logged."""
    config = small(**EVERYTHING, log_steps="50")
    fit(config, tmp_path / "straight", display=quiet())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError) as error:
        broken_at(27, patch, where)
        fit(config, tmp_path / "run", display=quiet())
    assert error.value.saved and error.value.run_dir == tmp_path / "run"
    report = fit(config, tmp_path / "run", resume=True, display=quiet())
    assert report["epochs"] == 3 and digest(tmp_path / "run") == digest(tmp_path / "straight")
    rows = [(tmp_path / run / "metrics.csv").read_bytes() for run in ("straight", "run")]
    assert rows[0] == rows[1]


STATE = {"a": jnp.arange(6.0)}


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
def test_a_save_that_fails_is_told_at_the_next_step(tmp_path, monkeypatch, code):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    number = getattr(errno, code)

    def no_space(*_, **__):
        raise ValueError(f"Failed to write 9 bytes: {os.strerror(number)} [os_error_code='7']")

    monkeypatch.setattr(checkpoints._manager, "save", no_space)
    checkpoints.save(1, STATE, {}, improvement=False)
    with pytest.raises(OSError) as error:
        for _ in range(500):  # steps
            checkpoints.check()
            time.sleep(0.01)
    assert error.value.errno == number
    checkpoints.close()


def test_a_limit_of_file_size_ends_a_run_in_one_line(tmp_path):
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (99999, -1));"
    limited += " runpy.run_path(sys.argv[0], run_name='__main__')"
    words = ["scripts/train.py", "--smoke", "--arch", "basic_cnn", "--no-compilation-cache"]
    words += ["--devices", "1", "--run-dir", str(tmp_path / "run")]
    code = f"import sys; sys.argv = {words!r}; {limited}"
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python would leave a part of a large .pyc file
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.count("\n") == 1 and "file too large" in outcome.stderr


LATE = """
import logging, sys
from flax_resnet.commands import exits
from flax_resnet.runs.checkpoint import Checkpoints

class Late:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

try:
    exits.run_command(lambda: Checkpoints(sys.argv[1]).close())
finally:
    Late()
    logger = logging.getLogger("asyncio")
    logger.error("Task exception was never retrieved, defined at /orbax/checkpoint/handlers.py")
    logger.error("of another library")
"""


def test_other_writes_of_a_failed_save_do_not_complain_after_the_command(tmp_path):
    """On a busy machine they end after the command has printed its one line."""
    program = [sys.executable, "-c", LATE, str(tmp_path)]
    outcome = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "ERROR:asyncio:of another library\n")


def test_a_failed_save_ends_the_training(tmp_path, monkeypatch):
    """The training ends in the next epoch, not at the end of the run."""

    def broken(self, *_):
        raise OSError(errno.EIO, "disk broke")

    monkeypatch.setattr(Checkpoints, "_write", broken)
    with pytest.raises(OSError, match="disk broke"):
        fit(small(epochs="50"), tmp_path / "run", display=quiet())
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) < 5


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """The next step may write into the same memory."""
    checkpoints = Checkpoints(tmp_path)
    state = {"a": np.arange(1e6, dtype=np.float32)}
    checkpoints.save(1, state, {}, improvement=False)
    state["a"][:] = 0
    assert checkpoints.restore(1, state)["a"][-1] == 1e6 - 1
    checkpoints.close()


def cut(config, run_dir, step, monkeypatch):
    """Run a training that is told to stop after this step."""
    original = loop.at_log_step

    def at_log_step(run, count):
        if run.global_step == step:
            run.signum = signal.SIGTERM
        return original(run, count)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "at_log_step", at_log_step)
        fit(config, run_dir, display=quiet())


def test_the_number_of_workers_may_change(tmp_path, monkeypatch):
    """Decoding by threads, then by two processes, gives the same bits, random areas included."""
    config = small(**EVERYTHING, epochs="2", data={"train_images": "320", "cache": "none"})
    fit(config, tmp_path / "straight", display=quiet())
    cut(config, tmp_path / "cut", 13, monkeypatch)
    outcome = run_script("train.py", "--resume", "--run-dir", tmp_path / "cut", "--num-workers", 2)
    assert outcome.status == 0, outcome.err
    assert digest(tmp_path / "cut") == digest(tmp_path / "straight")


def test_the_number_of_devices_may_change_and_is_said(tmp_path, monkeypatch):
    config = small(epochs="2", data={"train_images": "320"})
    fit(config, tmp_path / "straight", display=quiet())
    cut(config, tmp_path / "cut", 13, monkeypatch)
    outcome = run_script("train.py", "--resume", "--run-dir", tmp_path / "cut", "--devices", 2)
    assert outcome.status == 0, outcome.err
    assert "had 1 device(s) and now has 2" in outcome.out
    expected = weights(tmp_path / "straight")
    for name, value in weights(tmp_path / "cut").items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_run_with_parameters_in_parts_is_taken_up(tmp_path, monkeypatch):
    """The resumed run shards parameters equally and ends with the same bits."""
    in_parts = {"devices": "2", "shard_parameters": True}
    config = small(epochs="2", data={"train_images": "320"}, parallel=in_parts)
    fit(config, tmp_path / "straight", display=quiet())
    cut(config, tmp_path / "cut", 13, monkeypatch)
    flags = ["--run-dir", tmp_path / "cut", "--devices", 2, "--shard-parameters"]
    outcome = run_script("train.py", "--resume", *flags)
    assert outcome.status == 0, outcome.err
    assert digest(tmp_path / "cut") == digest(tmp_path / "straight")


def test_one_run_a_directory(tmp_path):
    """A second run is refused while the first is alive, and takes over after it died."""
    hold = (
        f"from flax_resnet.runs.directory import RunDirectory; d = RunDirectory({str(tmp_path)!r})"
    )
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); input()"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout.readline() == "held\n"
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"in use .*pid {first.pid}"):
                RunDirectory(tmp_path, **how)
        first.kill()
    RunDirectory(tmp_path, resume=True).close()
