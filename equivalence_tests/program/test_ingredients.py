"""The table of ingredients names tests, faults and flags that exist."""

import re

import pytest

from equivalence_tests import mutants
from equivalence_tests.studies import ingredients, kill_matrix
from flax_resnet.config import TrainConfig, flat


def test_every_test_and_every_mutant_exists():
    for _, test, faults in ingredients.INGREDIENTS.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (kill_matrix.TESTS / file).read_text()
        assert faults and set(faults) <= mutants.MUTANTS.keys()


def test_every_flag_exists():
    names = {name.rpartition(".")[2].replace("_", "-") for name in flat(TrainConfig())}
    flags = re.findall(r"`--([\w-]+)", " ".join(ingredients.INGREDIENTS))
    assert len(flags) > 15 and set(flags) <= names


def test_a_fault_that_nothing_has_killed_is_said():
    row = ingredients.rows()[0]
    assert "not yet" in ingredients.markdown([row | {"killed": {"a fault": None}}])
    assert "not yet" not in ingredients.markdown([row | {"killed": {"a fault": "a test"}}])


@pytest.mark.parametrize(
    ("message", "killer"),
    [("AttributeError: no 'mean'", None), ("AssertionError: 1 != 2", "a test")],
)
def test_a_mutant_that_crashes_is_no_kill(monkeypatch, message, killer):
    monkeypatch.setattr(kill_matrix, "run_tests", lambda *_, **__: (1, {"a test": message}))
    row = kill_matrix.row(next(iter(mutants.MUTANTS.values())))
    assert (row["killed_by"], row["message"]) == (killer, message)
