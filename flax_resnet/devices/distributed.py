"""Several processes of one run: how they connect, agree and end together.

`jax.distributed` connects the processes; NCCL (GPUs) or Gloo (CPUs) carries their collectives.
Every process calls the functions of this module in the same order. With one process they do
nothing.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
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
"""Time without a heartbeat after which a process counts as dead."""

SHUTDOWN_SECONDS = 30
"""Time that a finished process waits for the others."""

_CLUSTERS = {
    "SLURM_STEP_NUM_TASKS": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
"""{variable with the number of tasks of srun or mpirun: their other variables that JAX reads}"""

_HOSTS = "SLURM_STEP_NODELIST"

_PORTS_OF_JOBS = (
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", 2**12),
    ("SLURM_JOB_ID", "SLURM_PROCID", 1),
)
"""(variable of the job's number, of the process's, divisor of the job's), in JAX's order"""

_MOST_PROCESSES = 1_000_000

_DEAD = (
    "failed: another process of this run has died or no longer answers;"
    " start all of them again with --resume"
)


class CollectiveError(Exception):
    """Raised on all processes at once; a normal shutdown is safe."""


class RunLost(Exception):
    """Raised when the run directory is no longer the one that the run began in."""

    exit_status = errors.FAILED


class Refusal(InputError, CollectiveError):
    """Raised on all processes for bad input of any of them."""


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes, process_id, *, timeout: int):
    """Connect the processes of a run for the duration of the context; an error of one ends all.

    The context has to be entered before any use of a device.

    Args:
      coordinator: HOST:PORT of process 0, the same in all processes; "auto": jax.distributed asks
        the cluster (SLURM, Open MPI, Kubernetes); None: one process, or those of srun or mpirun.
      num_processes: number of processes; only if coordinator is an address.
      process_id: number of this process, from 0 on; only if coordinator is an address.
      timeout: seconds to wait for the other processes.

    Raises:
      InputError: the arguments contradict each other, or the processes do not connect in time.
    """
    _connect(coordinator, num_processes, process_id, timeout)
    _start_backends()
    try:
        yield
    except CollectiveError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _leave(*_last_words(error))


def _start_backends():
    """Find the devices. A signal ends the process at once meanwhile: JAX's search for plugins
    swallows the exception that a handler in Python raises."""
    stopping = signal.SIGTERM, signal.SIGHUP, signal.SIGINT
    python = {n: handler for n in stopping if callable(handler := signal.getsignal(n))}
    if threading.current_thread() is not threading.main_thread():
        python = {}
    try:
        for number in python:
            signal.signal(number, signal.SIG_DFL)
        jax.devices()
    finally:
        for number, handler in python.items():
            signal.signal(number, handler)


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
    # The service's handler would swallow SIGTERM, which the training loop handles.
    jax.config.update("jax_enable_preemption_service", False)
    _on_abort(f"error: not all processes connected to {address} within {timeout} s", 2)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:  # JAX's reading of a cluster's variables may raise anything
        raise InputError(f"no connection at {address}: {error}") from None
    _on_abort(_DEAD, 1)


def _started_by_a_cluster() -> bool:
    """True if srun or mpirun started several processes."""
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
    except UnicodeError:  # for "a..b", too
        return False


def _check_cluster_port():
    """Check, in process 0, that the port that JAX derives from the job's number is free."""
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
    """Raises InputError if another program has the port; jax.distributed would crash."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        # Connections of a run that has just ended do not occupy the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(f"{where}: port {port}: {error.strerror}") from None


def _wait_for(coordinator, timeout):
    """Wait until the coordinator listens (jax.distributed would abort); InputError on a timeout."""
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
    """True if this is process 0, which writes and prints."""
    return jax.process_index() == 0


def exchange(value) -> list:
    """All-gather a JSON value; the list has the value of each process, in their order."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value, allow_nan=False).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(own.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(own, (0, lengths.max() - own.size)))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def run_on_all(function: Callable[[], T]) -> T:
    """Call the function in every process; returns its result in this one.

    Raises:
      Refusal: in all processes, if the function raised InputError in any of them.
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
    """Raises Refusal, naming the first difference, unless all processes have the same facts.

    Args:
      facts: {name: JSON value}.
    """
    everyone = exchange(facts)
    for name in dict.fromkeys(name for each in everyone for name in each):
        values = [json.dumps(each.get(name), allow_nan=False) for each in everyone]
        for process, value in enumerate(values):
            if value != values[0]:
                raise Refusal(
                    f"the processes disagree on {name}: {values[0]:.60} in process 0,"
                    f" {value:.60} in process {process}"
                )


def share(total: int) -> slice:
    """The rows of `total` that belong to this process."""
    size = -(-total // jax.process_count())
    start = min(size * jax.process_index(), total)
    return slice(start, min(start + size, total))


def gather_rows(rows: np.ndarray, total: int) -> np.ndarray:
    """All-gather the rows `share(total)` of each process to `[total, ...]`."""
    if jax.process_count() == 1:
        return rows
    size = -(-total // jax.process_count())
    fill = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    everything = multihost_utils.process_allgather(np.pad(rows, fill))
    return everything.reshape(-1, *rows.shape[1:])[:total]


def barrier(name: str):
    """Wait until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed_signal(signum: int | None) -> int | None:
    """The highest signal that any process has received, or None; the same in all processes."""
    return max((number or 0 for number in exchange(signum)), default=0) or None


def _last_words(error: BaseException) -> tuple[int, str]:
    """Exit status and message for an error that this process alone has raised."""
    return (1, _DEAD) if "Gloo" in str(error) else errors.verdict(error)


def _leave(status, text):
    """Exit without jax.distributed's shutdown barrier, which waits for dead peers."""
    sys.stdout.flush()
    os.write(2, f"{text}\n".encode(errors="surrogateescape"))
    os._exit(status)


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _on_abort(text, status):
    """Set the message and exit status of an abort(), which jaxlib calls if its peers are lost. A
    handler in C is needed, because no Python handler runs then."""
    global _handler
    _handler = _Handler(lambda signum: _leave(status, text))
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, _Handler
    libc.signal(signal.SIGABRT, _handler)


_handler = None  # keeps the handler alive, because C has no reference to it
