"""Settings of every test: eight CPU devices, rank promotion is an error.

--mutant NAME      inject a known fault (`mutants/`); some test has to fail
--inputs-seed N    draw other random inputs; none may fail
--record NAME      write outcomes and seconds to results/NAME.json
"""

import ctypes
import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# XLA would end the process if one device waits 40 s for the others. Eight of them may share one
# busy core, and a virtual machine may stand still for minutes.
os.environ["XLA_FLAGS"] = (
    f"--xla_cpu_collective_call_terminate_timeout_seconds=36000 {os.environ.get('XLA_FLAGS', '')}"
)

# Each test process is pinned to one core: with one thread per core in every process, the processes
# would spend half their time waiting for one another. Importing JAX starts the threads.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import hypothesis
import jax
import pytest

from equivalence_tests import results, surroundings
from equivalence_tests.parity import inputs

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile(
    "any speed",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any speed")  # on a busy machine, drawing takes long

LONG_FILES = (
    "test_float64", "test_parity_script", "test_faults", "test_train", "test_float32", "test_ports",
    "test_training", "test_parallel", "test_accelerators", "test_members", "test_export",
    "test_models", "test_convert", "test_augment", "test_around_a_run",
)  # fmt: skip
"""Files of a minute or more, the longest first: begun last, one would keep one worker alone."""


def pytest_addoption(parser):
    parser.addoption("--mutant", metavar="NAME")
    parser.addoption("--inputs-seed", type=int, default=0, metavar="N")
    parser.addoption("--record", metavar="NAME")


def pytest_configure(config):
    gc.set_threshold(700, 10, 100)  # full collections, which visit all libraries, took a tenth
    surroundings.move_home()
    surroundings.heed_signals()
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    inputs.SEED = config.getoption("--inputs-seed")
    if name := config.getoption("--mutant"):
        from equivalence_tests import mutants

        fault = mutants.injected(mutants.MUTANTS[name])
        fault.__enter__()
        config.add_cleanup(lambda: fault.__exit__(None, None, None))
    if hasattr(config, "workerinput"):
        return
    if name := config.getoption("--record"):
        config.pluginmanager.register(results.Recorder(name))
    else:
        config.pluginmanager.register(surroundings.Checkout(config.rootpath))
    config.add_cleanup(surroundings.remove_home)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # otherwise the order is that of the command line
        rank = {name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="session")
def _empty_working_directory(tmp_path_factory):
    """Every test runs in an empty working directory, so files of the user cannot decide it."""
    with surroundings.empty_directory(tmp_path_factory.mktemp("working_directory")):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """Drops compiled programs after each file; JAX would keep them all in memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _freed_memory_is_given_back():
    """Returns freed memory to the system; glibc kept 11 GB after the largest networks.

    It takes as long as a short test does, so a small process keeps its memory.
    """
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim and resident_bytes() > 4 * 2**30:
        trim(0)


def resident_bytes() -> int:
    """Memory of this process on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _float64_is_off_again():
    """Turns float64 off after each test: training, or reading, a run in float64 turns it on."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def x64():
    """Enables float64 in JAX for one test."""
    with jax.enable_x64(True):
        assert jax.numpy.zeros(1).dtype == "float64"
        yield
