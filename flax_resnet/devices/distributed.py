"""Several processes, one run: they find each other, agree, and end together.

`jax.distributed` connects them; NCCL (GPUs) or Gloo (CPUs) carries what they exchange. Every
process calls the functions here in the same order. With one process they do nothing.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnet import errors
from flax_resnet.errors import InputError

T = TypeVar("T")

HEARTBEAT_SECONDS = 60
"""Without a sign of life for so long, a process counts as dead."""

SHUTDOWN_SECONDS = 30
"""A process that is done waits so long for the others."""

_CLUSTERS = {
    "SLURM_STEP_NUM_TASKS": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
"""{how many tasks srun or mpirun started: the other numbers of theirs that JAX reads}"""

_HOSTS = "SLURM_STEP_NODELIST"

_PORTS_OF_JOBS = (
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", 2**12),
    ("SLURM_JOB_ID", "SLURM_PROCID", 1),
)
"""(number of the job, of the process, what the former is a multiple of), in JAX's order"""

_MOST_PROCESSES = 1_000_000

_DEAD = (
    "failed: another process of this run has died or no longer answers;"
    " start all of them again with --resume"
)


class Everywhere(Exception):
    """Raised in all processes at the same point, so that they can end in the ordinary way."""


class RunLost(Exception):
    """The run directory is no longer the one that the run began in."""

    exit_status = errors.FAILED


class Refusal(InputError, Everywhere):
    """Bad input of whichever process, known to all."""


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes, process_id, *, timeout: int):
    """Connect the processes of a run, and let an error of one of them end all.

    Has to come before anything that touches a device.

    Args:
      coordinator: HOST:PORT of process 0, the same for all; "auto": jax.distributed asks the
        cluster (SLURM, Open MPI, Kubernetes). None: one process, or those of an srun or mpirun.
      num_processes: in the run, where coordinator is an address.
      process_id: from 0 on, where coordinator is an address.
      timeout: seconds to wait for the others at the start.

    Raises:
      InputError: the arguments make no sense, or the others are not there in time.
    """
    _connect(coordinator, num_processes, process_id, timeout)
    try:
        yield
    except Everywhere:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _leave(*_last_words(error))


def _connect(coordinator, num_processes, process_id, timeout):
    if coordinator in (None, "auto"):
        if (num_processes, process_id) != (None, None):
            raise InputError("`num_processes` and `process_id` need `coordinator` HOST:PORT")
        if coordinator is None and not _started_by_a_cluster():
            return
        _check_cluster_port()
        address, given = "the address that the cluster names", (None,) * 3
    else:
        _check_arguments(coordinator, num_processes, process_id)
        address, given = coordinator, (coordinator, num_processes, process_id)
        if process_id:
            _wait_for(coordinator, timeout)
        else:
            _check_free(int(coordinator.rpartition(":")[2]), "`coordinator`")
    # Its handler would swallow a SIGTERM; the training loop has its own.
    jax.config.update("jax_enable_preemption_service", False)
    _on_abort(f"error: not all processes came to {address} within {timeout} s", 2)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:  # of JAX's reading of a cluster's variables: whatever it stumbles on
        raise InputError(f"no connection at {address}: {error}") from None
    _on_abort(_DEAD, 1)


def _started_by_a_cluster() -> bool:
    """Whether srun or mpirun started several of us."""
    for tasks, others in _CLUSTERS.items():
        if os.environ.get(tasks) and _number(tasks, tasks) > 1:
            for name in others:
                _number(name, tasks)
            if tasks.startswith("SLURM") and not os.environ.get(_HOSTS):
                raise InputError(f"{_HOSTS} names no host; to run one process, unset {tasks}")
            return True
    return False


def _number(name, tasks) -> int:
    value = os.environ.get(name, "")
    if not (value.isascii() and value.isdecimal()):
        raise InputError(
            f"{name} is {value!r} instead of the number that srun or mpirun gives; to run one"
            f" process, unset {tasks}"
        )
    return int(value)


def _check_arguments(coordinator, num_processes, process_id):
    host, _, port = coordinator.rpartition(":")
    if not _is_host(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"`coordinator`: {coordinator!r} is neither HOST:PORT nor auto")
    if num_processes is None or process_id is None:
        raise InputError("`coordinator` HOST:PORT needs `num_processes` and `process_id`")
    if num_processes > _MOST_PROCESSES:
        raise InputError(f"`num_processes`: at most {_MOST_PROCESSES:,}, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"`process_id`: {process_id} is not one of {num_processes} processes, counted from 0"
        )


def _is_host(name) -> bool:
    try:
        return bool(name.encode("idna"))
    except UnicodeError:  # of "a..b" too
        return False


def _check_cluster_port():
    """`_check_free` in process 0 of the port that JAX makes of a job's number."""
    for job, rank, unit in _PORTS_OF_JOBS:
        number = os.environ.get(job, "").partition(".")[0]
        if number.isdecimal():
            port = 2**16 - 2**12 + int(number) // unit % 2**12
            chosen = os.environ.get("JAX_COORDINATOR_PORT") or str(port)
            if not (chosen.isdecimal() and 0 < int(chosen) < 2**16):
                raise InputError(f"JAX_COORDINATOR_PORT is {chosen!r}, not the number of a port")
            if os.environ.get(rank) == "0":
                _check_free(int(chosen), "JAX_COORDINATOR_PORT chooses another one")
            return


def _check_free(port, where):
    """jax.distributed would die of a segmentation fault where another program listens."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        # What lingers of a run that has just ended is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(f"{where}: port {port}: {error.strerror}") from None


def _wait_for(coordinator, timeout):
    """jax.distributed would end the process by a stack trace where nobody listens."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = min(max(deadline - time.monotonic(), 0.1), 60)
            return socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
        except OSError as error:
            if time.monotonic() + 0.2 > deadline:
                raise InputError(
                    f"coordinator {coordinator} did not answer within {timeout} s: {error}"
                ) from None
        time.sleep(0.2)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def exchange(value) -> list:
    """A JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(own.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(own, (0, lengths.max() - own.size)))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def together(function: Callable[[], T]) -> T:
    """What the function returns here, once it has succeeded in every process.

    Raises:
      Refusal: in all of them, where it raised InputError in any.
    """
    if jax.process_count() == 1:
        return function()
    result, fault = None, None
    try:
        result = function()
    except Refusal:
        raise
    except InputError as error:
        fault = str(error)
    for process, text in enumerate(exchange(fault)):
        if text is not None:
            raise Refusal(fault or f"process {process}: {text}")
    return result


def check_agreement(facts: dict):
    """Raises Refusal, naming the first that differs, unless all processes have the same facts.

    Args:
      facts: {name: JSON value}.
    """
    everyone = exchange(facts)
    for name in dict.fromkeys(name for each in everyone for name in each):
        values = [json.dumps(each.get(name)) for each in everyone]
        for process, value in enumerate(values):
            if value != values[0]:
                raise Refusal(
                    f"the processes disagree on {name}: {values[0]:.60} in process 0,"
                    f" {value:.60} in process {process}"
                )


def share(total: int) -> slice:
    """This process's part of so many rows."""
    size = -(-total // jax.process_count())
    start = min(size * jax.process_index(), total)
    return slice(start, min(start + size, total))


def gather_rows(rows: np.ndarray, total: int) -> np.ndarray:
    """The rows `share(total)` of every process -> `[total, ...]` in each."""
    if jax.process_count() == 1:
        return rows
    size = -(-total // jax.process_count())
    fill = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    everything = multihost_utils.process_allgather(np.pad(rows, fill))
    return everything.reshape(-1, *rows.shape[1:])[:total]


def meet(where: str):
    """Wait until every process has come to this point, whose name is the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def agreed_signal(signum: int | None) -> int | None:
    """The signal that any of the processes has got: all of them see the same."""
    return max((number or 0 for number in exchange(signum)), default=0) or None


def _last_words(error: Exception) -> tuple[int, str]:
    """Exit status, and what to say of an error of this process alone."""
    return (1, _DEAD) if "Gloo" in str(error) else errors.verdict(error)


def _leave(status, text):
    """Without the end of `jax.distributed`, which would wait for those who cannot come."""
    sys.stdout.flush()
    os.write(2, f"{text}\n".encode(errors="surrogateescape"))
    os._exit(status)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _on_abort(text, status):
    """jaxlib calls abort() where the others are lost: no Python handler runs then, but this."""
    global _handler
    _handler = _Handler(lambda signum: _leave(status, text))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, _Handler
    libc.signal(signal.SIGABRT, _handler)


_handler = None  # C keeps no reference
