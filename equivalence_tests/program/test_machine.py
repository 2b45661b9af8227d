"""The machine and the revision that reports name."""

import platform
import subprocess
from pathlib import Path

import pytest
import torch

import torch_ref.environment
from flax_resnet import machine
from flax_resnet.runs import environment

GIT = ["git", "-c", "user.name=me", "-c", "user.email=me@here"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A repository with one file, which takes the place of the module."""
    (tmp_path / "module.py").write_text("one")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "module.py"))
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True)
    return tmp_path / "module.py"


def test_both_frameworks_name_machine_and_revision_alike():
    ours, reference = environment.describe(1), torch_ref.environment.describe(torch.device("cpu"))
    assert ours["device"] == reference["device"] != platform.machine()
    assert ours["revision"] == reference["revision"] == machine.revision()


def test_a_changed_file_adds_a_plus_to_the_revision(module):
    (module.parent / "notes.txt").write_text("untracked")
    clean = machine.revision()
    assert len(clean) == 12
    module.write_text("two")
    assert machine.revision() == f"{clean}+"


def test_the_repository_around_an_installed_package_is_not_its_own(module, monkeypatch):
    """Such as that of a user who has the package in a `.venv` there."""
    installed = module.parent / ".venv" / "module.py"
    installed.parent.mkdir()
    installed.write_text("one")
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine.revision() == "unknown"


def test_a_machine_without_git_knows_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.revision() == "unknown"


@pytest.mark.parametrize("cpuinfo", [None, "processor : 0\nBogoMIPS : 50.0\n"])
def test_a_machine_without_a_model_name_has_a_processor(monkeypatch, cpuinfo):
    """macOS lacks /proc/cpuinfo, and on ARM the file names no model."""

    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine.processor() == (platform.processor() or "cpu")
