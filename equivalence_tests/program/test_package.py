"""The wheel, installed outside the repository: packages, command, types."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from equivalence_tests.program.command import ROOT, run_installed

PACKAGES = ("flax_resnet", "torch_ref", "equivalence_tests")


def pip(*words):
    command = [sys.executable, "-m", "uv", "pip", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel, built from a copy because a build leaves files in its tree."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with only the wheel installed; dependencies come from the tests' environment."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--offline", "--target", target, wheel)
    return target


def run(installed: Path, *words, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_every_module_and_mark_of_types_is_in_the_wheel(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(PACKAGES)}
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = {name for name in tracked if name.endswith((".py", "py.typed"))}
    assert not wanted - packed
    assert {f"{name}/py.typed" for name in PACKAGES} <= packed


def test_what_is_installed_is_imported_from_there(installed, tmp_path):
    code = (
        "import flax_resnet, torch_ref, equivalence_tests.mutants as m; print(flax_resnet.__file__)"
    )
    done = run(installed, sys.executable, "-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(installed / "flax_resnet/__init__.py"), done.stderr


def test_the_command_trains_and_evaluates(installed, tmp_path):
    command = installed / "bin/flax-resnet"
    flags = ["--arch", "basic_cnn", "--smoke", "--run-dir", "runs/a"]
    done = run(installed, command, "train", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(installed, command, "evaluate", "runs/a", cwd=tmp_path)
    assert done.returncode == 0 and "test: 32 images" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "words, status, text",
    [
        ([], 0, "benchmark"),
        (["--help"], 0, "SUBCOMMAND"),
        (["trian"], 2, "did you mean 'train'"),
        (["train", "--arch", "resnet19"], 2, "did you mean 'resnet18'"),
        (["predict", "--help"], 0, "\nflax-resnet predict runs/"),
    ],
)
def test_the_command_answers(words, status, text):
    done = run_installed(*words)
    assert done.status == status and text in done.out + done.err
