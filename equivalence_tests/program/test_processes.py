"""Several real processes on one machine, over Gloo: equal to one, stopped, killed and resumed.

If a process dies, the others end at their next collective. If a process hangs, the others end after
`distributed.HEARTBEAT_SECONDS`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax._src import clusters
from PIL import Image

from equivalence_tests.parity.tolerances import PARALLEL, TRAINING, largest_error
from equivalence_tests.program.command import ROOT, run_script
from flax_resnet.devices import distributed
from flax_resnet.errors import InputError
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.tables import read_rows
from flax_resnet.training import loop, restore

# Splits are not divisible by the processes; in float64 only the order of summation differs.
SHORT = (
    "--arch basic_cnn --dtype float64 --train-images 70 --eval-images 37 --batch-size 16"
    " --eval-batch-size 16 --epochs 1 --log-steps 2 --horizontal-flip 0.5 --dropout 0.3 --lr 0.01"
).split()
# Images are decoded for every step, all random parts are on, 48 steps.
LONG = (
    *SHORT,
    *"--epochs 12 --log-steps 1 --cache none --random-resized-crop --rotation 10".split(),
    *"--mixup 0.2 --ema-decay 0.9".split(),
)
TRAIN = str(ROOT / "scripts" / "train.py")
DEADLINE = 300  # seconds; a run takes 40 on its own core


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def processes(*each: list, program=(TRAIN,), folders=None, environs=None):
    """Starts one program per list of flags, each with one CPU device; yields the processes."""
    started = []
    for number, flags in enumerate(each):
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *map(str, flags)],
                env=environ | (environs[number] if environs else {}),
                cwd=folders[number] if folders else ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def joined(run_dir, *each) -> list[list]:
    """Flags of the processes of one run, with their coordinator."""
    at = ["--run-dir", run_dir, "--coordinator", f"127.0.0.1:{free_port()}"]
    at += ["--num-processes", len(each)]
    return [[*at, "--process-id", number, *flags] for number, flags in enumerate(each)]


def ends(started) -> list[SimpleNamespace]:
    """Status, standard error and its last line of each process."""
    deadline, outcomes = time.monotonic() + DEADLINE, []
    for process in started:
        _, err = process.communicate(timeout=deadline - time.monotonic())
        last = err.splitlines()[-1] if err else ""
        outcomes.append(SimpleNamespace(status=process.returncode, last=last, err=err))
    return outcomes


def run(run_dir, *each, **how):
    with processes(*joined(run_dir, *each), **how) as started:
        outcomes = ends(started)
    said = "\n".join(outcome.err for outcome in outcomes)
    assert [outcome.status for outcome in outcomes] == [0] * len(each), said


def wait_for_epoch(run_dir, epoch, started):
    deadline = time.monotonic() + DEADLINE
    while len(read_rows(run_dir / "metrics.csv")) < epoch:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), ends(started)
        time.sleep(0.01)


def alone(run_dir, *flags, status=0):
    """Train in this process, with one device."""
    outcome = run_script("train.py", "--run-dir", run_dir, "--devices", 1, *flags)
    assert outcome.status == status, outcome.err


def numbers(run_dir) -> dict:
    """{name: value} of metrics.csv, of the metrics of every split, and of the last state."""
    rows = enumerate(read_rows(run_dir / "metrics.csv"))
    found = {f"{name} {i}": value for i, row in rows for name, value in row.items()}
    report = json.loads((run_dir / "report.json").read_text())
    for split, values in report["splits"].items():
        found |= {f"{split} {name}": value for name, value in values.items()}
    state = restore.restore(run_dir, Checkpoints.latest)[-1]
    leaves = jax.tree.flatten_with_path(state)[0]
    return found | {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("processes") / "short"
    alone(run_dir, *SHORT)
    return numbers(run_dir)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("processes") / "long"
    alone(run_dir, *LONG)
    return numbers(run_dir)


def test_two_processes_are_one(tmp_path, short):
    run(tmp_path / "run", SHORT, SHORT)
    assert largest_error(numbers(tmp_path / "run"), short) <= PARALLEL


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_are_one(tmp_path, long, count):
    run(tmp_path / "run", *[LONG] * count)
    assert largest_error(numbers(tmp_path / "run"), long) <= TRAINING


@pytest.mark.slow
def test_parameters_in_parts_are_the_same(tmp_path, short):
    flags = [*SHORT, "--shard-parameters"]
    run(tmp_path / "run", flags, flags)
    assert largest_error(numbers(tmp_path / "run"), short) <= PARALLEL


WRONG_SHARD = f"""
import runpy
from flax_resnet.devices.parallel import Engine
Engine.local_rows = lambda self, size: slice(0, size // 2)
runpy.run_path({TRAIN!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.control
def test_a_process_with_the_wrong_shard_is_noticed(tmp_path, short):
    """Negative control: the second process reads the shard of the first."""
    run(tmp_path / "run", SHORT, SHORT, program=("-c", WRONG_SHARD))
    assert largest_error(numbers(tmp_path / "run"), short) > 1e6 * PARALLEL


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path, long):
    """After SIGTERM to one process both stop; one process resumes as if it had been alone."""
    run_dir = tmp_path / "run"
    with processes(*joined(run_dir, LONG, LONG)) as started:
        wait_for_epoch(run_dir, 2, started)
        started[1].send_signal(signal.SIGTERM)
        outcomes = ends(started)
    assert [outcome.status for outcome in outcomes] == [143, 143], outcomes
    assert all("the work is saved" in outcome.last for outcome in outcomes)
    document = restore.restore(run_dir, Checkpoints.latest)[0]
    assert document["num_devices"] == 2 and 2 <= document["progress"]["epoch"] < 12
    alone(run_dir, "--resume")
    assert largest_error(numbers(run_dir), long) <= TRAINING


@pytest.mark.slow
def test_one_process_stops_and_two_go_on(tmp_path, long, monkeypatch):
    original = loop.at_log_step

    def stop_at_21(run, count):
        if run.global_step == 21:
            run.signum = signal.SIGTERM
        return original(run, count)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "at_log_step", stop_at_21)
        alone(tmp_path / "run", *LONG, status=143)
    flags = ["--resume", "--devices", 2]
    run(tmp_path / "run", flags, flags)
    assert largest_error(numbers(tmp_path / "run"), long) <= TRAINING


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_ends_the_other(tmp_path, victim):
    flags = [*SHORT, "--epochs", 1000]
    with processes(*joined(tmp_path / "run", flags, flags)) as started:
        wait_for_epoch(tmp_path / "run", 1, started)
        started[victim].kill()
        before = time.monotonic()
        outcome = ends([started[1 - victim]])[0]
        seconds = time.monotonic() - before
    print(f"{seconds:.1f} s")
    assert outcome.status == 1 and "another process of this run has died" in outcome.last, outcome
    assert seconds < distributed.HEARTBEAT_SECONDS


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other(tmp_path):
    flags = [*SHORT, "--epochs", 1000]
    with processes(*joined(tmp_path / "run", flags, flags)) as started:
        wait_for_epoch(tmp_path / "run", 1, started)
        started[1].send_signal(signal.SIGSTOP)
        before = time.monotonic()
        outcome = ends([started[0]])[0]
        seconds = time.monotonic() - before
    print(f"{seconds:.1f} s")
    assert outcome.status == 1 and "no longer answers" in outcome.last, outcome
    assert seconds < 2 * distributed.HEARTBEAT_SECONDS


def refused(run_dir, *each, **how) -> str:
    """The error line with which all processes end."""
    with processes(*each, **how) as started:
        outcomes = ends(started)
    assert [outcome.status for outcome in outcomes] == [2] * len(each), outcomes
    assert all("Traceback" not in outcome.err for outcome in outcomes), outcomes
    assert not run_dir.exists()
    return outcomes[0].last


@pytest.mark.slow
@pytest.mark.parametrize(
    "first,second,words",
    [
        (["--seed", 1], ["--seed", 2], "disagree on seed: 1 in process 0, 2 in process 1"),
        (["--dropout", ".1"], ["--dropout", ".2"], "disagree on model.dropout: 0.1"),
        (["--batch-size", 15], ["--batch-size", 15], "--batch-size 15 cannot be divided among 2"),
    ],
)
def test_what_cannot_be_is_refused_by_all(tmp_path, first, second, words):
    each = joined(tmp_path / "run", [*SHORT, *first], [*SHORT, *second])
    assert words in refused(tmp_path / "run", *each)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["pixels", "images"])
def test_other_data_on_another_host_is_noticed(tmp_path, change):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "ab":
            folder = tmp_path / "0" / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    victim = tmp_path / "1" / "data" / "val" / "b" / "3.png"
    if change == "images":
        victim.rename(victim.with_name("33.png"))
    else:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(victim)
    flags = "--arch basic_cnn --dataset folder:data --batch-size 4 --validation-fraction 0".split()
    each = joined(tmp_path / "run", flags, flags)
    line = refused(tmp_path / "run", *each, folders=[tmp_path / "0", tmp_path / "1"])
    assert f"disagree on test {change}: " in line


@pytest.mark.slow
def test_a_slurm_step_is_found_by_itself(tmp_path):
    """Two tasks as srun starts them connect; the message counts the devices of both."""
    step = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    }  # fmt: skip
    tasks = [{**step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    flags = ["--run-dir", tmp_path / "run", *SHORT, "--devices", 3]
    assert "--devices 3: there are 2" in refused(tmp_path / "run", flags, flags, environs=tasks)


@pytest.mark.slow
def test_a_coordinator_whose_others_do_not_come(tmp_path):
    each = joined(tmp_path / "run", SHORT, SHORT)[:1]
    each[0] += ["--connect-timeout", 3]
    with processes(*each) as started:
        (outcome,) = ends(started)
    assert outcome.status == 2
    words = ("not all processes connected to 127.0.0.1:", "within 3 s")
    assert all(word in outcome.last for word in words)


def test_facts_that_differ_between_processes_are_named(monkeypatch):
    """The facts of three processes are given without starting them."""
    facts = [{"seed": 1, "the test images": "8"}, {"seed": 1, "the test images": "9"}]
    monkeypatch.setattr(distributed, "exchange", lambda own: [own, facts[0], facts[1]])
    with pytest.raises(distributed.Refusal, match="the test images: .* in process 2"):
        distributed.check_agreement(facts[0])
    facts[1] = facts[0]
    distributed.check_agreement(facts[0])


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("nowhere", 2, 0), "'nowhere' is neither HOST:PORT nor auto"),
        (("host:99999", 2, 0), "neither HOST:PORT"),
        (("host:0", 2, 0), "neither HOST:PORT"),
        (("host:\u00b2", 2, 0), "neither HOST:PORT"),
        (("a..b:99", 2, 0), "neither HOST:PORT"),
        ((":99", 2, 0), "neither HOST:PORT"),
        (("host:1234", 0, 0), "0 is not one of 0 processes"),
        (("host:1234", 2, -1), "-1 is not one of 2 processes"),
        (("host:1234", 10**18, 0), "at most 1,000,000"),
        (("host:1234", 2, None), "needs `num_processes` and `process_id`"),
        (("host:1234", 2, 2), "2 is not one of 2 processes"),
        ((None, 2, 0), "need `coordinator`"),
    ],
)
def test_invalid_arguments_of_processes_are_named(arguments, words):
    with pytest.raises(InputError, match=words), distributed.joined(*arguments, timeout=1):
        pass


def test_a_port_that_another_program_listens_at(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it crashes"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use"):
            with distributed.joined(f"127.0.0.1:{port}", 2, 0, timeout=1):
                pass


CLUSTERS = {
    "slurm": {
        "SLURM_JOB_ID": "12345", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
    },
    "open mpi": {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.1.0.1:34911",
        "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    },
}  # fmt: skip


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_port_of_a_cluster_that_another_program_listens_at(monkeypatch, cluster, chosen):
    """The port that JAX derives from the job number is in use."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it crashes"))
    for name, value in CLUSTERS[cluster].items():
        monkeypatch.setenv(name, value)
    if chosen:
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(free_port()))
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    port = int(detect(None, None, None, None, None, 1)[0].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(InputError, match=f"_PORT chooses another one: port {port}: Address"):
            with distributed.joined(None, None, None, timeout=1):
                pass


TASK = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "variables,words",
    [
        ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS is 'abc'"),
        ({"SLURM_STEP_NUM_TASKS": "-2"}, "SLURM_STEP_NUM_TASKS is '-2'"),
        ({"OMPI_COMM_WORLD_SIZE": "2.5"}, "OMPI_COMM_WORLD_SIZE is '2.5'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID is '' .* unset SLURM_STEP_NUM_TASKS"),
        (TASK | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        (TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST names no"),
        (CLUSTERS["slurm"] | {"JAX_COORDINATOR_PORT": "x"}, "JAX_COORDINATOR_PORT is 'x', not the"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "LOCAL_RANK is ''"),
    ],
)
def test_odd_variables_of_a_cluster_are_named(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words), distributed.joined(None, None, None, timeout=1):
        pass


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_a_variable_of_a_cluster_that_names_one_task_is_one_process(monkeypatch, value):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", value)
    with distributed.joined(None, None, None, timeout=1):
        pass


def test_a_coordinator_that_does_not_answer(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    outcome = run_script(
        "train.py", "--run-dir", tmp_path / "run", "--coordinator", address,
        "--num-processes", 2, "--process-id", 1, "--connect-timeout", 1,
    )  # fmt: skip
    assert outcome.status == 2 and len(outcome.err.splitlines()) == 1
    assert f"coordinator {address} did not answer within 1 s" in outcome.err
    assert not (tmp_path / "run").exists()
