"""Fixtures of several test files."""

import jax
import pytest

from equivalence_tests.program.insects import train_on, write_folder
from equivalence_tests.program.run_directory import without_training


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of images of ants and bees."""
    return write_folder(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="session")
def insects(folder, tmp_path_factory):
    """The directory of a run on ants and bees."""
    run_dir = tmp_path_factory.mktemp("run") / "insects"
    outcome = train_on(folder, run_dir, "--epochs", 4)
    assert outcome.status == 0, outcome.err
    return run_dir


@pytest.fixture
def ranks_are_promoted():
    """Arrays of different ranks may be added, as users have it: Keras does so."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def begun(tmp_path):
    """The directory of a run that was cut off after one epoch."""
    return without_training(tmp_path / "run")
