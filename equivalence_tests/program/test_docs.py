"""Documentation: tables match the results, the site builds, the notebook runs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from equivalence_tests import results
from equivalence_tests.program.command import ROOT, run_installed
from equivalence_tests.results import FOLDER
from equivalence_tests.studies import doc_tables, growth

PAGES = {path.name: path for path in doc_tables.pages()}


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_are_made_of_the_results(name):
    """`python -m equivalence_tests.studies.doc_tables` writes the tables."""
    text = PAGES[name].read_text()
    assert doc_tables.filled(text) == text


def test_every_table_stands_in_a_page():
    used = [
        name
        for path in PAGES.values()
        for _, name, _ in doc_tables.MARKED.findall(path.read_text())
    ]
    assert sorted(used) == sorted(doc_tables.TABLES)


def named_modules(text: str) -> set[str]:
    """Modules and scripts that the commands of a text start."""
    return set(re.findall(r"python3? (?:-m ([\w.]*\w)|(scripts/\w+\.py))", text))


def test_every_command_names_what_exists():
    files = (p for p in FOLDER.rglob("*") if p.suffix in (".json", ".md"))
    named = set().union(*(named_modules(p.read_text()) for p in (*PAGES.values(), *files)))
    modules, scripts = ({pair[i] for pair in named} - {""} for i in (0, 1))
    assert "scripts/train.py" in scripts and "torch_ref.train" in modules
    assert [s for s in scripts if not (ROOT / s).is_file()] == []
    assert [m for m in modules if importlib.util.find_spec(m) is None] == []


def test_a_million_files_stay_within_the_bounds_that_were_set():
    measured = results.read("growth")
    large, rates = measured["sizes"][-1], measured["growth"]
    assert growth.over(large, rates) == []
    (line,) = growth.over(large, rates | {"training": 2.0})
    assert line == "growth of training is 2, over 1.5"


@pytest.mark.control
def test_a_command_of_a_module_that_has_moved_is_noticed():
    ((module, _),) = named_modules('"python -m equivalence_tests.growth"')
    assert importlib.util.find_spec(module) is None


@pytest.mark.control
def test_an_edited_figure_is_noticed():
    text = PAGES["README.md"].read_text()
    edited = text.replace(" of 20 ", " of 21 ").replace("20 other sets", "21 other sets")
    assert edited != text == doc_tables.filled(edited)


def test_the_readme_is_short():
    assert len(PAGES["README.md"].read_text().splitlines()) <= 180


EXAMPLE = re.compile(r"<!-- example: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)


def test_the_example_of_a_port_prints_what_the_page_says(tmp_path, monkeypatch):
    parts = dict(EXAMPLE.findall(PAGES["port.md"].read_text()))
    (tmp_path / "my_port.py").write_text(parts["my_port.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    flags = ["--jax-model", "my_port:Jax", "--torch-model", "my_port:Torch"]
    with jax.numpy_rank_promotion("allow"):
        outcome = run_installed("parity", *flags)
    assert outcome.status == 1
    assert outcome.out + outcome.err == parts["output"]


def build(config: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_site_builds_without_a_dead_link_or_reference(tmp_path):
    done = build(ROOT / ".ci/mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    for name in ("create_model", "TrainConfig", "label_smoothing", "prepare_batch"):
        assert name in api
    assert api.count("&gt;&gt;&gt;") > 20  # examples are code, not quotations in quotations
    for page in (ROOT / "docs").glob("*.md"):  # none is replaced by a file of results/
        place = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        assert f">{title}<" in (tmp_path / "site" / place).read_text(), page


@pytest.mark.control
def test_a_dead_link_stops_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)\n")
    lines = (ROOT / ".ci/mkdocs.yml").read_text().splitlines()
    kept = ["site_name: test", "docs_dir: docs", *lines[lines.index("validation:") :]]
    (tmp_path / "mkdocs.yml").write_text("\n".join(kept))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1 and "nowhere.md" in done.stderr


@pytest.mark.slow  # a few minutes
def test_the_notebook_runs(monkeypatch):
    """It calls `flax-resnet`, which lies beside the interpreter."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(ROOT / "docs/port_a_resnet.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
