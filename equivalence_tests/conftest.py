"""Strict JAX for every test: eight CPU devices, rank promotion is an error.

--mutant NAME      run on code with a known fault in it (`mutants/`); tests have to fail
--inputs-seed N    draw other random inputs; none may fail
--record NAME      write outcomes and seconds to results/NAME.json
"""

import ctypes
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# A core for each test process: with as many threads as cores each, they would spend half their
# time waiting for one another. Before the imports, which start the threads.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax
import pytest

from equivalence_tests import results, surroundings
from equivalence_tests.parity import inputs

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--mutant", metavar="NAME")
    parser.addoption("--inputs-seed", type=int, default=0, metavar="N")
    parser.addoption("--record", metavar="NAME")


def pytest_configure(config):
    surroundings.move_home()
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


@pytest.fixture(autouse=True, scope="session")
def _empty_working_directory(tmp_path_factory):
    """A test that takes the user's files for its own would pass or fail by what lies there."""
    with surroundings.empty_directory(tmp_path_factory.mktemp("working_directory")):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """JAX keeps every program that it has compiled."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _freed_memory_is_given_back():
    """glibc keeps what a test has freed: after the largest networks a process stayed at 11 GB."""
    yield
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture
def x64():
    """Float64 in JAX for one test, asserted to be on."""
    with jax.enable_x64(True):
        assert jax.numpy.zeros(1).dtype == "float64"
        yield
