"""The repository: pinned versions, import contracts, the README's commands."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from packaging.requirements import Requirement

from equivalence_tests import surroundings

ROOT = Path(__file__).parents[2]
PINS = (ROOT / "constraints.txt").read_text().split("\n")[:-1]


def test_pyproject_and_constraints_pin_the_same():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["uv"]["constraint-dependencies"] == PINS
    assert not re.search(r"https?:|@", "".join(PINS))


@pytest.mark.control
@pytest.mark.parametrize("turn", [1, 2])
def test_float64_that_a_test_leaves_on_is_off_in_the_next(turn):
    assert not jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)


def test_what_is_installed_is_what_is_pinned():
    """Two machines get the same versions, whenever they install."""
    wrong, checked = [], 0
    for pin in map(Requirement, PINS):
        if pin.marker and not pin.marker.evaluate():
            continue
        try:
            installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError:
            continue  # part of an extra that is not installed
        checked += 1
        if not pin.specifier.contains(installed.split("+")[0]):
            wrong.append(f"{pin.name} {installed} instead of {pin.specifier}")
    assert not wrong and checked > 50


def test_every_dependency_is_pinned():
    pinned = {Requirement(pin).name.lower().replace("_", "-") for pin in PINS}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(r for extra in extras for r in extra)]
    names = {Requirement(r).name.lower().replace("_", "-") for r in asked} - {"flax-resnet"}
    assert names <= pinned


def test_imports_point_one_way():
    """The contracts are in pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        [("flax_resnet.training.fit", {"torch"})],
        [
            ("flax_resnet.config", {"jax", "numpy"}),
            ("flax_resnet.commands.cli", {"jax"}),
            ("torch_ref.train", {"jax"}),
        ],
    ],
    ids=["of JAX", "without JAX"],
)
def test_importing_does_not_bring(imports):
    """One process imports the modules in turn, because a new process takes seconds."""
    code = "import sys\n"
    for module, absent in imports:
        code += f"import {module}\nassert not {absent} & sys.modules.keys(), {module!r}\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_ci_runs_the_two_commands_of_the_readme_in_their_order():
    commands = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-2:]
    readme = (ROOT / "README.md").read_text()
    assert readme.index(f"\n{commands[0]}\n") < readme.index(f"\n{commands[1]}\n")
    assert commands[0].endswith("scripts/train.py --arch resnet18")
    assert commands[1].endswith("uv run --extra test pytest")


def test_the_tests_work_in_an_empty_directory_with_a_home_of_their_own():
    home = Path(os.environ["HOME"])
    assert not list(Path.cwd().iterdir()) and ROOT not in Path.cwd().parents
    assert home.name.startswith("flax_resnet-tests-") and home == Path.home()
    assert Path(os.environ["XDG_CACHE_HOME"]).parent == home


def test_folders_that_the_user_has_named_are_not_for_tests(monkeypatch):
    names = ("HF_HOME", "TORCH_HOME", "MPLCONFIGDIR", "TFDS_DATA_DIR")
    for name in names:
        monkeypatch.setenv(name, "/home/user/cache")
    surroundings.move_home()
    assert not set(names) & set(os.environ)


def test_a_file_that_the_tests_leave_in_the_checkout_is_noticed(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n__pycache__/\n")
    session = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    for name, left in (
        ("__pycache__/file", []),
        (".venv/file", []),
        ("runs/file", ["!! runs/file"]),
        ("runs/other", ["!! runs/other"]),  # in a folder that was there before
    ):
        checkout = surroundings.Checkout(tmp_path)
        checkout.pytest_sessionstart()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        checkout.pytest_sessionfinish(session)
        assert checkout.left == left
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED


def test_no_file_fixes_an_interpreter_or_a_host():
    tracked = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert not {".python-version", "uv.lock"} & set(tracked)


@pytest.mark.parametrize("command", [["check", "--no-cache"], ["format", "--no-cache", "--check"]])
def test_ruff_is_content(command):
    subprocess.run([sys.executable, "-m", "ruff", *command, "."], check=True, cwd=ROOT)
