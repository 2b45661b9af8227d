"""Files that commands write: they replace nothing that the command reads or nobody has named."""

import ast
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from equivalence_tests.benchmark import command as benchmark
from equivalence_tests.program.command import ROOT, refused, run_script
from equivalence_tests.program.run_directory import tree, without_training, write
from flax_resnet.commands import cli, cross_validate, evaluate, output_files
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.sources import places
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.training import fit


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with an image in it."""
    write(tmp_path / "set" / "test" / "bee" / "00.png")
    return tmp_path / "set"


def test_two_outputs_of_one_name_are_refused(tmp_path):
    path = tmp_path / "out"
    (tmp_path / "link").symlink_to(path)
    for other in (path, tmp_path / "." / "out", tmp_path / "link"):
        with pytest.raises(InputError, match="--json and --csv both name"):
            output_files.check_outputs({"--json": path, "--csv": other})
    with pytest.raises(InputError, match="--json and --csv both name -"):
        output_files.check_outputs({"--json": Path("-"), "--csv": Path("-")})
    output_files.check_outputs({"--json": path, "--csv": tmp_path / "other", "--worst": None})


def test_a_folder_that_takes_no_files_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # for root all may write
    with pytest.raises(InputError, match="--json: nothing can be written in"):
        output_files.check_outputs({"--json": tmp_path / "new.json"})
    with pytest.raises(InputError, match="--report: nothing can be written in"):
        output_files.check_folder("--report", tmp_path)
    output_files.check_folder("--report", tmp_path / "new")
    (tmp_path / "null").symlink_to(os.devnull)
    output_files.check_outputs({"--json": tmp_path / "null"})


def test_an_input_is_no_output(tmp_path, images, monkeypatch):
    picture, run = (
        images / "test" / "bee" / "00.png",
        write(tmp_path / "run" / "config.json").parent,
    )
    for path, how in (
        (picture, {"inputs": [picture]}),
        (picture, {"data": [images]}),
        (run / "new.json", {"inputs": [run]}),
    ):
        with pytest.raises(InputError, match="--json: .* is one of the files that are read"):
            output_files.check_outputs({"--json": path}, **how)
    for _ in range(2):  # a report may be written anew where the images lie
        output_files.check_outputs({"--json": images / "new.json"}, data=[images])
        write(images / "new.json")
    with pytest.raises(InputError, match="--plot: .* is one of the files that are read"):
        output_files.check_outputs({"--plot": picture.with_name("plot.png")}, data=[images])
    monkeypatch.chdir(run)
    output_files.check_outputs({"--json": Path("-")}, [run])  # standard output is no file


def test_the_places_of_a_data_set(tmp_path):
    names = [write(tmp_path / f"train-{number}") for number in range(2)]
    assert sorted(places(f"arrayrecord:{tmp_path}/train-*")) == list(map(str, names))
    write(tmp_path / "[a]" / "x")
    assert places(f"folder:{tmp_path}/[a]") == [f"{tmp_path}/[a]"]
    assert places("digits") == places("hf:owner/name") == places(f"folder:{tmp_path}/none") == []


def test_no_command_takes_an_image_of_its_data_for_an_output(images, tmp_path):
    """Runs that are not there would be refused later, with other words."""
    picture, data = images / "test" / "bee" / "00.png", f"folder:{images}"
    before = tree(tmp_path)
    evaluated = ["evaluate.py", tmp_path / "run", "--dataset", data]
    for words in (
        [*evaluated, "--json", picture],
        [*evaluated, "--worst", picture],
        [*evaluated, "--confusion-matrix", picture],
        ["plan.py", "--target", "h100", "--dataset", data, "--plot", picture],
    ):
        refused(run_script(*words), "is one of the files that are read")
    for flags in (["x", "x"], ["-", "-"]):
        both = ["--json", flags[0], "--predictions", flags[1]]
        refused(run_script(*evaluated, *both), "--json and --predictions both name")
    one = tmp_path / "one.png"
    compared = ["compare.py", tmp_path / "a", tmp_path / "b", "--plot", one, "--json", one]
    refused(run_script(*compared), "--plot and --json both name")
    refused(run_script("plan.py", "--target", "h100", "--plot", tmp_path / "x.txt"), "ends in .png")
    assert tree(tmp_path) == before


def test_shards_do_not_lie_among_their_images(images, tmp_path):
    before = tree(tmp_path)
    outcome = run_script("shards.py", f"folder:{images}", images / "test" / "shards")
    refused(outcome, "OUT: ", "is one of the files that are read")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["run", "test/bee/run"])
def test_a_run_does_not_lie_among_its_images(images, tmp_path, place):
    """Its folder and its pictures would be a class of the next run."""
    (tmp_path / "link").symlink_to(images)
    for root in (images, tmp_path / "link"):
        with pytest.raises(InputError, match="run lies in .*set, the folder of the images"):
            fit._check_apart(root / place, f"folder:{images}")
    fit._check_apart(tmp_path / "set-run", f"folder:{images}")
    fit._check_apart(images / place, "digits")


def test_the_own_data_of_a_run_are_not_replaced(images, monkeypatch):
    run = SimpleNamespace(config=TrainConfig(data=DataConfig(dataset=f"folder:{images}")))
    monkeypatch.setattr(evaluate, "opened_all", lambda names, args: ({"run": run}, run, None))
    picture = str(images / "test" / "bee" / "00.png")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "run", "--predictions", picture])
    with pytest.raises(InputError, match="--predictions: .* is one of the files that are read"):
        evaluate.main()


def test_the_report_of_a_comparison_does_not_replace_its_mapping(tmp_path):
    mapping = write(tmp_path / "out" / "parity.json", "{}")
    nets = ["--jax-model", "nets:jax", "--torch-model", "nets:torch"]
    words = ["parity.py", *nets, "--mapping", mapping, "--report", tmp_path / "out"]
    refused(run_script(*words), "--mapping and --report both name")
    weights = ["parity.py", "--checkpoint", mapping, "--report", tmp_path / "out"]
    refused(run_script(*weights), "--report: ", "is one of the files that are read")


# The benchmark


def figures(path: Path, dataset="digits"):
    return SimpleNamespace(json=path, dataset=dataset)


def test_the_chart_of_a_benchmark_replaces_nothing_of_others(tmp_path, images):
    with pytest.raises(InputError, match="--json and the chart beside it both name"):
        benchmark.check_files(figures(tmp_path / "x.png"))
    with pytest.raises(InputError, match="one of the files that are read"):
        benchmark.check_files(figures(images / "test" / "bee" / "00.png", f"folder:{images}"))
    write(tmp_path / "x.png")
    with pytest.raises(InputError, match="the chart .*x.png exists, and no .*x.json with it"):
        benchmark.check_files(figures(tmp_path / "x.json"))
    write(tmp_path / "x.json")  # the pair of an earlier benchmark
    for path in (tmp_path / "x.json", Path("-"), None):
        benchmark.check_files(figures(path))
    for path in (Path(), Path("..")):
        with pytest.raises(InputError, match="is a directory"):
            benchmark.check_files(figures(path))


def test_a_benchmark_writes_its_figures_to_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    benchmark.write(Path("-"), {"rows": [], "ratio": math.nan})
    assert json.loads(capsys.readouterr().out) == {"rows": [], "ratio": None}
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_not_there(tmp_path):
    path = write(tmp_path / "figures.png")
    with pytest.raises(ZeroDivisionError), replacing(path) as place:
        place.write_text("half")
        assert place.suffix == ".png" and place.parent == tmp_path
        raise ZeroDivisionError
    assert tree(tmp_path) == {"figures.png": b"mine"}


# Flags without effect


def test_an_average_of_one_run_is_refused():
    kinds = ("probabilities", "logits")
    assert cli.chosen_average(None, kinds, ["a"]) == "probabilities"
    assert cli.chosen_average("logits", kinds, ["a", "b"]) == "logits"
    for runs in (["a"], ["a", "a"], ["a", "./a/", "b/../a"]):
        with pytest.raises(InputError, match="--average has no effect with one run"):
            cli.chosen_average("logits", kinds, runs)
    refused(run_script("evaluate.py", "run", "--average", "logits"), "--average has no effect")


# The folders of several runs


CONFIG = TrainConfig(data=DataConfig(folds=2, fold=0))


@pytest.mark.parametrize("name", ["predictions.csv", "curves.png", "confusion_matrix.png"])
def test_a_cross_validation_replaces_only_its_own_files(tmp_path, name):
    folds = {tmp_path / "fold-0": CONFIG}
    cross_validate.check(tmp_path / "new", folds)
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is of no cross-validation; move it"):
        cross_validate.check(tmp_path, folds)
    write(tmp_path / "cross_validation.json")
    cross_validate.check(tmp_path, folds)


@pytest.mark.parametrize("name", ["cross_validation.json", "predictions.csv", "curves.png"])
def test_a_cross_validation_writes_through_no_link(tmp_path, name):
    write(tmp_path / "root" / "cross_validation.json")
    (tmp_path / "root" / name).unlink(missing_ok=True)
    for make in (lambda path: path.symlink_to(tmp_path / "mine"), Path.mkdir, os.mkfifo):
        make(tmp_path / "root" / name)
        with pytest.raises(InputError, match=f"{name} is no regular file; move it"):
            cross_validate.check(tmp_path / "root", {})
        (tmp_path / "root" / name).rename(tmp_path / f"other-{len(os.listdir(tmp_path))}")


def test_a_cross_validation_looks_at_all_folds_before_the_first(tmp_path, begun):
    with pytest.raises(InputError, match="is a run itself: the folds need another directory"):
        cross_validate.check(begun, {})
    with pytest.raises(InputError, match="config.json is not a directory"):
        cross_validate.check(begun / "config.json", {})
    folds = dict.fromkeys((tmp_path / "fold-0", tmp_path / "fold-1"), CONFIG)
    write(tmp_path / "fold-1" / "thesis.txt")
    with pytest.raises(InputError, match="fold-1 is no run and not empty"):
        cross_validate.check(tmp_path, folds)
    folds = {without_training(tmp_path / "fold-2"): CONFIG}
    with pytest.raises(InputError, match="fold-2 was begun with other flags: data.fold"):
        cross_validate.check(tmp_path, folds)


# JSON


READERS = "flax_resnet/config/files.py"
"""The functions there write JSON only to read it again, NaN included."""


def writers_of_nan(source: str) -> list[int]:
    """The lines of calls that may write NaN, which JSON does not have."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]
    strict = "allow_nan=False"
    return [c.lineno for c in named if strict not in map(ast.unparse, c.keywords)]


def test_a_closed_standard_output_takes_no_file(monkeypatch):
    output_files.check_outputs({"--json": Path("-")})
    monkeypatch.setattr(sys, "__stdout__", None)  # as Python starts where it is closed
    with pytest.raises(InputError, match="--json -: standard output is closed"):
        output_files.check_outputs({"--json": Path("-")})


def test_nothing_writes_nan_into_a_json():
    assert writers_of_nan("json.dumps({}, indent=1)\njson.dump({}, file)") == [1, 2]
    assert writers_of_nan("from json import dumps") == []
    found = []
    for package in ("flax_resnet", "torch_ref", "equivalence_tests", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name, source = str(path.relative_to(ROOT)), path.read_text()
            if path.name.startswith("test_") or name == READERS:
                continue
            assert "from json import" not in source, name
            found += [f"{name}:{line}" for line in writers_of_nan(source)]
    assert found == []
