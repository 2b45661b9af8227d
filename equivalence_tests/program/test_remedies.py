"""Timed variants of a step: each is a different program for the same numbers."""

import json
import sys

import jax
import pytest
from flax import nnx

from equivalence_tests.benchmark import lowerings, timed_jax
from flax_resnet.commands import exits


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["remedies", *words])
    return lowerings.main()


@pytest.mark.slow
def test_a_step_is_timed_as_it_is_and_in_another_way(tmp_path, monkeypatch):
    words = "library-convolution --arch basic_cnn --image-size 8 --batch-size 4 --blocks 2"
    run(monkeypatch, *words.split(), "--json", str(tmp_path / "steps.json"))
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert list(rows) == ["as-is", "library-convolution"]
    ours, theirs = rows.values()
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-6)
    assert ours["times_as_long"] == 1 and min(r["milliseconds"] for r in rows.values()) > 0


@pytest.mark.parametrize(
    ("way", "exact_at", "lost_at"),
    [
        ("as-is", "100000 deviations", None),
        ("two-pass", "100000 deviations", None),
        ("one-pass", "0 deviations", "1000 deviations + running"),
        ("shifted", "100000 deviations + running", "1000 deviations"),
    ],
)
def test_what_the_statistics_lose(way, exact_at, lost_at):
    lost = lowerings.digits_lost(way)
    assert lost[exact_at] < 1e-6
    assert lost_at is None or lost[lost_at] > 1e-4


@pytest.mark.slow  # nine networks are traced
def test_every_way_is_another_program(monkeypatch):
    monkeypatch.setattr(lowerings.Step, "__new__", lambda _, compiled, *rest: compiled)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: lowered.as_text())
    words = "--arch resnet18 --image-size 64 --batch-size 32".split()
    monkeypatch.setattr(sys, "argv", ["remedies", *words])
    job = lowerings.make_job(lowerings.parse())
    variables = nnx.state(lowerings.make_model(job))
    names = [name for name in lowerings.WAYS if name != "library-options"]  # compiler only
    assert len({lowerings.compile_step(job, name, variables) for name in names}) == len(names)


def test_an_unknown_variant_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, "faster")
    assert status.value.code == 2 and "unknown faster" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["remedies", "--arch", "resnet19"])
    with pytest.raises(SystemExit) as status:
        exits.run_command(lowerings.main)
    assert status.value.code == 2 and "resnet18" in capsys.readouterr().err


def test_a_timed_variant_leaves_no_patch():
    names = [(place, name, getattr(place, name)) for place, name, _ in lowerings.WAYS["library"]]
    with lowerings.computed("library"):
        assert all(getattr(place, name) is not before for place, name, before in names)
        assert timed_jax.compiler_options("cpu") == {}
    assert all(getattr(place, name) is before for place, name, before in names)
