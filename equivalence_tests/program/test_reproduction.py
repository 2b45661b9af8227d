"""Recipes: what the commands make of them, and the table of what they reached."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from equivalence_tests import results
from equivalence_tests.program.command import ROOT, refused, run_script
from equivalence_tests.program.insects import write_folder
from equivalence_tests.studies import paired_training, reproduction, reproduction_page
from flax_resnet.config import from_dict, to_dict
from flax_resnet.errors import InputError
from flax_resnet.imagenet_recipes import IMAGENET_RECIPES
from flax_resnet.models import create_model
from flax_resnet.recipes import COMPARISONS, RECIPES
from flax_resnet.runs import plots, views
from torch_ref.train import check_supported

COURSE = "epoch,train_loss,train_accuracy,validation_loss,validation_accuracy\n1,2,0.3,2,0.2\n"


def write_run(results, recipe, name="seed0", *, accuracy=0.5, best_epoch=1, dataset="folder:beads"):
    folder = results / "recipes" / recipe / name
    folder.mkdir(parents=True)
    scores = {"loss": 1.0, "accuracy": accuracy, "precision_macro": accuracy}
    scores |= {"recall_macro": accuracy, "f1_macro": accuracy}
    report = {
        "splits": {split: scores for split in ("train", "validation", "test")},
        "epochs": 1,
        "best_epoch": best_epoch,
        "seconds": 90.0,
        "environment": {"device": "<an abacus>"},
        "command": f"python scripts/train.py --dataset {dataset}",
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "metrics.csv").write_text(COURSE)


def test_every_recipe_can_be_built():
    for recipe in RECIPES.values():
        model = recipe.config.model
        nnx.eval_shape(lambda model=model: create_model(model.arch, stem=model.stem))
        assert from_dict(to_dict(recipe.config)) == recipe.config
        assert recipe.starts_from is None or recipe.starts_from in RECIPES
        assert all(re.fullmatch("(validation|test)_[a-z1_]+", name) for name in recipe.published)
        assert bool(recipe.published) <= bool(recipe.source)


def test_comparisons_are_of_recipes():
    assert {name for names in COMPARISONS.values() for name in names} <= RECIPES.keys()


def test_a_comparison_names_every_setting_in_which_its_recipes_differ():
    assert reproduction.differences(["transfer-scratch", "transfer"]) == {
        "starts from": ["random weights", "transfer-source"],
        "lr": ["0.05", "0.02"],
    }
    assert reproduction.differences(["transfer", "transfer"]) == {}


def test_list_recipes_says_what_each_is():
    lines = run_script("train.py", "--list-recipes").out.splitlines()
    assert len(lines) == len(RECIPES | IMAGENET_RECIPES)
    [line] = [line for line in lines if line.split()[0] == "timm-a1"]
    assert "arXiv:2110.00476" in line and "validation accuracy 0.8040" in line
    [line] = [line for line in lines if line.split()[0] == "imagenette-cnn"]
    assert "dropout 0.3" in line and "test accuracy 0.6308" in line


def test_seeds_become_a_mean_and_a_deviation(tmp_path):
    write_run(tmp_path, "imagenette-cnn", accuracy=0.5)
    write_run(tmp_path, "imagenette-cnn", "seed1", accuracy=0.6)
    write_run(tmp_path, "imagenette-cnn", "seed0-torch", accuracy=0.7)
    write_run(tmp_path, "imagenette-cnn", "seed0-subset256", accuracy=0.1)
    rows = reproduction_page.rebuild(tmp_path)
    assert [(r["framework"], r["subset"], r["seeds"]) for r in rows] == [
        ("jax", None, [0, 1]),
        ("jax", 256, [0]),
        ("torch", None, [0]),
    ]
    text = (tmp_path / "recipes.md").read_text()
    assert (
        "| `imagenette-cnn` | test accuracy | 0.6308 | 0.5500 ± 0.0707 | 2 | 1 | 64 | 2 |" in text
    )
    assert "`imagenette-cnn` (256 images) | test accuracy | 0.6308 | 0.1000 | 1 |" in text
    assert "`imagenette-cnn` (torch) | test accuracy | 0.6308 | 0.7000 | 1 |" in text
    assert "`cifar10-fast` (published test accuracy 0.9547)" in text[text.index("Not run: ") :]


def test_a_row_says_whether_its_run_read_the_original_data(tmp_path):
    write_run(tmp_path, "imagenette-cnn")
    write_run(tmp_path, "imagenette-cnn", "seed0-torch", dataset="tfds:imagenette/320px-v2")
    text = reproduction_page.markdown(reproduction_page.rebuild(tmp_path))
    assert "| `imagenette-cnn` | test accuracy |" in text
    assert "| `imagenette-cnn` (torch, original) | test accuracy |" in text


def test_what_ran_in_both_frameworks_stands_side_by_side(tmp_path):
    for seed, accuracy in enumerate((0.600, 0.601, 0.602)):
        write_run(tmp_path, "imagenette-cnn", f"seed{seed}", accuracy=accuracy)
        write_run(tmp_path, "imagenette-cnn", f"seed{seed}-torch", accuracy=accuracy + 0.001)
        write_run(tmp_path, "imagenette-resnet18", f"seed{seed}", accuracy=accuracy)
        write_run(tmp_path, "imagenette-resnet18", f"seed{seed}-torch", accuracy=accuracy - 0.01)
    write_run(tmp_path, "imagenette-cnn", "seed9", accuracy=0.1)
    write_run(tmp_path, "transfer-source")
    write_run(tmp_path, "transfer-source", "seed0-torch")
    for seed in (0, 1):  # without a spread there is nothing to test
        write_run(tmp_path, "transfer-scratch", f"seed{seed}")
        write_run(tmp_path, "transfer-scratch", f"seed{seed}-torch")
    reproduction_page.rebuild(tmp_path)
    text, page = ((tmp_path / f"recipes.{end}").read_text() for end in ("md", "html"))
    seconds = "| 3 | 0.6010 ± 0.0010 |"
    assert f"`imagenette-cnn` {seconds} 0.6020 ± 0.0010 | 2 | 2 | -0.1 (-0.3 to +0.1) | yes" in text
    assert f"`imagenette-resnet18` {seconds} 0.5910 ± 0.0010 | 2 | 2 | +1.0" in text
    assert text.count("not shown, p = 1 |") == 1
    assert "| `transfer-source` | 1 | 0.5000 | 0.5000 | 2 | 2 | - | not tested |" in text
    assert "| `transfer-scratch` | 2 |" in text and text.count("not tested") == 2
    assert "<td>-0.1 (-0.3 to +0.1)<td>yes" in page


def test_a_comparison_of_one_recipe_is_that_of_the_frameworks(tmp_path):
    write_run(tmp_path, "cifar10-resnet20", "seed0-torch", accuracy=0.6)
    write_run(tmp_path, "cifar10-resnet20")
    reproduction_page.rebuild(tmp_path)
    assert (tmp_path / "recipes-resnet-20-in-both-frameworks.png").exists()
    page = (tmp_path / "recipes.html").read_text()
    assert "0.6000 (+10.0 points against the first run)" in page
    assert "The recipes differ" not in page


@pytest.mark.parametrize(
    ("difference", "least", "most"),
    [(0.0, 0.95, 1.0), (reproduction.MARGIN, 0.02, 0.08), (-reproduction.MARGIN, 0.02, 0.08)],
)
@pytest.mark.parametrize("equivalence", [reproduction.equivalence, paired_training.equivalence])
def test_two_one_sided_tests_err_as_often_as_they_say(equivalence, difference, least, most):
    """At the margin itself a test at 5% says "equivalent" in 5% of all cases: of 1,000 draws with a
    standard deviation of 0.7%, so the bounds lie four of them away."""
    rng = np.random.default_rng(0)
    ours = rng.normal(0.9, 0.002, (1000, 10))
    theirs = rng.normal(0.9 - difference, 0.003, (1000, 10))
    found = [equivalence(*pair) for pair in zip(ours, theirs, strict=True)]
    assert least <= np.mean([each["equivalent"] for each in found]) <= most


def test_the_paired_trainings_would_not_pass_half_a_point_apart():
    measured = results.read("tost")
    ours, theirs = np.array(measured["jax"]), np.array(measured["torch"])
    assert paired_training.equivalence(ours, theirs)["equivalent"]
    for shift in (-reproduction.MARGIN, reproduction.MARGIN):
        assert not paired_training.equivalence(ours + shift, theirs)["equivalent"]


@pytest.mark.control
def test_a_large_fault_shows_in_the_paired_trainings():
    measured = results.read("tost-dampened-momentum")
    assert measured["seeds"] == list(paired_training.SEEDS)
    assert not paired_training.equivalence(measured["jax"], measured["torch"])["equivalent"]


def test_the_page_compares_and_needs_nothing_else(tmp_path):
    write_run(tmp_path, "transfer-scratch", accuracy=0.5)
    write_run(tmp_path, "transfer", accuracy=0.75)
    plots.curves(tmp_path / "recipes/transfer/seed0/curves.png", [
        {"epoch": 1, "train_loss": 1, "train_accuracy": 0.5}
    ])  # fmt: skip
    reproduction_page.rebuild(tmp_path)
    page = (tmp_path / "recipes.html").read_text()
    assert "+25.0 points against transfer-scratch" in page
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;an abacus&gt;" in page and "<an abacus>" not in page
    assert not re.search(r"(src|href)=.?(http|/|\.)", page)
    assert (tmp_path / "recipes-fine-tuned-from-imagenette-and-from-scratch.png").exists()


def test_runs_are_compared_on_the_same_images_alone(tmp_path):
    write_run(tmp_path, "cifar10-resnet50-224", accuracy=0.9)
    for recipe, accuracy in (("resnet50", 0.2), ("resnet101", 0.3)):
        write_run(tmp_path, f"cifar10-{recipe}-224", "seed0-subset512", accuracy=accuracy)
    reproduction_page.rebuild(tmp_path)
    page = (tmp_path / "recipes.html").read_text()
    assert "<h3>ResNet-50 and ResNet-101, 224 pixels (512 images)</h3>" in page
    assert "+10.0 points against cifar10-resnet50-224" in page
    assert page.count("points against") == 1
    assert [path.name for path in tmp_path.glob("*.png")] == [
        "recipes-resnet-50-and-resnet-101-224-pixels-512-images.png"
    ]


def removed(*keys):
    """A change of a report: a fact is deleted."""
    return lambda report: _holder(report, keys).pop(keys[-1])


def made(value, *keys):
    """A change of a report: a fact takes a value."""
    return lambda report: _holder(report, keys).update({keys[-1]: value})


def _holder(report: dict, keys) -> dict:
    for key in keys[:-1]:
        report = report[key]
    return report


DAMAGES = {
    "environment.device": [removed("environment", "device"), made(5, "environment", "device")],
    "seconds": [made(10**400, "seconds"), made(math.nan, "seconds"), made("1", "seconds")],
    "test_accuracy": [removed("splits", "test"), made(None, "splits", "test", "accuracy")],
    "train_accuracy": [removed("splits", "train"), removed("splits", "train", "accuracy")],
    "test_loss": [made(10**400, "splits", "test", "loss")],
    "validation_loss": [removed("splits", "validation", "loss")],
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_report_without_a_figure_of_the_table_is_named(tmp_path, words):
    write_run(tmp_path, "imagenette-cnn")
    path = tmp_path / "recipes/imagenette-cnn/seed0/report.json"
    sound = path.read_text()
    for change in DAMAGES[words]:
        change(report := json.loads(sound))
        path.write_text(json.dumps(report))
        outcome = run_script("reproduce.py", "--table", "--results", tmp_path)
        refused(outcome, "seed0/report.json", words, "missing or wrong")


@pytest.mark.parametrize("content, words", [
    (COURSE.replace("epoch", "apoch"), "epoch is missing"),
    (COURSE.replace("validation_loss", "loss"), "validation_loss is missing"),
    (COURSE.splitlines()[0] + "\n", "every row is missing"),
])  # fmt: skip
def test_a_course_that_cannot_be_drawn_is_named(tmp_path, content, words):
    for recipe in ("transfer-scratch", "transfer"):
        write_run(tmp_path, recipe)
    (tmp_path / "recipes/transfer/seed0/metrics.csv").write_text(content)
    outcome = run_script("reproduce.py", "--table", "--results", tmp_path)
    refused(outcome, "transfer/seed0/metrics.csv", words)


def test_a_course_may_have_numbers_beyond_every_float(tmp_path):
    for recipe in ("transfer-scratch", "transfer"):
        write_run(tmp_path, recipe)
    huge = COURSE.replace("\n1,2,", f"\n1,{'9' * 400},")
    (tmp_path / "recipes/transfer/seed0/metrics.csv").write_text(huge)
    reproduction_page.rebuild(tmp_path)


def test_a_table_is_written_through_no_link_and_a_pipe_is_no_picture(tmp_path):
    write_run(tmp_path, "imagenette-cnn")
    os.mkfifo(tmp_path / "recipes/imagenette-cnn/seed0/curves.png")
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in ("recipes.json", "recipes.md", "recipes.html"):
        (tmp_path / name).symlink_to(mine)
    reproduction_page.rebuild(tmp_path)
    assert mine.read_text() == "mine" and "0.5000" in (tmp_path / "recipes.md").read_text()
    for flag in ("--results", "--runs"):
        refused(run_script("reproduce.py", "--table", flag, mine), flag, "is no directory")


def test_the_name_of_a_device_steers_no_terminal_and_no_table(tmp_path):
    write_run(tmp_path, "imagenette-cnn")
    path = tmp_path / "recipes/imagenette-cnn/seed0/report.json"
    path.write_text(path.read_text().replace("<an abacus>", r"a\u001b[2J|b"))
    assert r"| a\x1b[2J/b |" in reproduction_page.markdown(reproduction_page.rebuild(tmp_path))


def test_a_run_of_an_unknown_recipe_is_named(tmp_path):
    write_run(tmp_path, "imagenette-dnn")
    with pytest.raises(InputError, match="imagenette-dnn"):
        reproduction_page.rebuild(tmp_path)


def test_a_run_of_an_unknown_name_is_named(tmp_path):
    write_run(tmp_path, "imagenette-cnn", "seed0-old")
    with pytest.raises(InputError, match="imagenette-cnn/seed0-old"):
        reproduction_page.rebuild(tmp_path)


def test_what_is_committed_is_what_the_runs_say():
    """The table of the results, from the reports of the runs."""
    results = ROOT / "results"
    rows = reproduction.table_rows(reproduction.finished(results / "recipes"))
    pairs = reproduction.side_by_side(rows)
    assert json.loads((results / "recipes.json").read_text()) == {
        "rows": rows,
        "side_by_side": pairs,
    }
    for table in (reproduction_page.markdown(rows), reproduction_page.pairs_markdown(rows)):
        assert table in (results / "recipes.md").read_text()


@pytest.fixture
def called(tmp_path, monkeypatch) -> list[list[str]]:
    """The commands of all runs, of which only the files are made, and those count as sound."""
    called = []
    monkeypatch.setattr(views, "faults", lambda run_dir: [])

    def pretend(command):
        called.append(command)
        place = Path(command[command.index("--run-dir") + 1])
        write_run(tmp_path, place.parent.name, place.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "recipes" / place.parent.name / place.name, place)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    return called


def test_each_seed_runs_once_in_both_frameworks(tmp_path, called):
    flags = ["imagenette-cnn", "--runs", tmp_path / "runs", "--results", tmp_path, "--seeds", 3, 5]
    assert run_script("reproduce.py", *flags).status == 0
    assert [command[command.index("--seed") + 1] for command in called] == ["3", "5"]
    outcome = run_script("reproduce.py", *flags, "--torch", "--imagenette", "folder:pictures")
    twin = ["-m", "torch_ref.train", "--recipe", "imagenette-cnn"]
    assert [command[1:5] for command in called[2:]] == [twin] * 2
    assert "`imagenette-cnn` | test accuracy | 0.6308 | 0.5000 ± 0.0000 | 2 |" in outcome.out
    kept = tmp_path / "recipes/imagenette-cnn"
    assert {p.name for p in kept.iterdir()} == {"seed3", "seed5", "seed3-torch", "seed5-torch"}


def test_the_twin_runs_every_recipe_and_the_table_is_rebuilt(tmp_path, called):
    flags = ["--torch", "--runs", tmp_path / "runs", "--results", tmp_path]
    refused(run_script("reproduce.py", *flags, "--cifar10", "folder:a"), "--torch", "--imagenette")
    assert not called
    outcome = run_script(
        "reproduce.py", *flags, "--cifar10", "folder:a", "--imagenette", "folder:b"
    )
    assert outcome.status == 0
    assert sum("torch_ref.train" in command for command in called) == len(RECIPES)
    assert len(called) == 2 * len(RECIPES) and "`transfer` (torch) |" in outcome.out
    starts = {c[c.index("--run-dir") + 1]: c[c.index("--init-from") + 1]
              for c in called if "--init-from" in c}  # fmt: skip
    runs = tmp_path / "runs"
    for name in ("seed0", "seed0-torch"):
        assert starts[str(runs / "transfer" / name)] == str(runs / "transfer-source" / name)


def test_without_a_gpu_the_long_recipes_take_few_images(tmp_path, called):
    flags = ["--runs", tmp_path / "runs", "--results", tmp_path]
    assert run_script("reproduce.py", *flags).status == 0
    limits = ["--train-images", "512", "--eval-images", "512"]
    short = {command[command.index("--recipe") + 1] for command in called if limits[0] in command}
    assert short == {name for name, recipe in RECIPES.items() if recipe.gpu}
    assert all(command[-4:] == limits for command in called if limits[0] in command)
    assert run_script("reproduce.py", "cifar10-fast", *flags).status == 0
    assert limits[0] not in called[-1]


def test_a_table_of_no_runs_is_a_table(tmp_path):
    outcome = run_script("reproduce.py", "--table", "--results", tmp_path / "new")
    assert outcome.status == 0
    assert all(f"`{name}`" in outcome.out[outcome.out.index("Not run: ") :] for name in RECIPES)
    refused(run_script("reproduce.py", "--subset", 0), "--subset", "at least 1")


def test_what_a_recipe_goes_back_to_runs_first(tmp_path, called):
    names = [f"cifar10-resnet18-{p}" for p in ("48px-start", "48-to-64px", "64-to-80px")]
    flags = ["--runs", tmp_path / "runs", "--results", tmp_path]
    assert run_script("reproduce.py", names[-1], *flags).status == 0
    assert [command[command.index("--recipe") + 1] for command in called] == names
    starts = [Path(c[c.index("--init-from") + 1]).parent.name for c in called[1:]]
    assert starts == names[:-1]


def test_a_run_that_fails_is_the_last(tmp_path, monkeypatch):
    called = []

    def fail(command):
        called.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    flags = ["transfer", "--runs", tmp_path / "runs", "--results", tmp_path]
    assert run_script("reproduce.py", *flags).status == 1
    assert [command[3] for command in called] == ["transfer-source"]


@pytest.mark.slow  # 15 epochs
def test_a_recipe_runs_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    write_folder(tmp_path / "images", per_class=80, size=20)
    flags = ["imagenette-cnn", "--imagenette", f"folder:{tmp_path}/images", "--subset", 128]
    flags += ["--runs", tmp_path / "runs", "--results", tmp_path / "results"]
    outcome = run_script("reproduce.py", *flags)
    assert outcome.status == 0, outcome
    kept = tmp_path / "results/recipes/imagenette-cnn/seed0-subset128"
    assert {path.name for path in kept.iterdir()} == set(reproduction.KEPT)
    assert "`imagenette-cnn` (128 images)" in outcome.out
    assert "running" in outcome.out and "running" not in run_script("reproduce.py", *flags).out


def test_the_twin_takes_every_recipe():
    for recipe in RECIPES.values():
        check_supported(recipe.config)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["imagenette-cmn"], ["imagenette-cnn"]),
        (["--seeds", "one"], ["seeds"]),
        (["--cifar11", "x"], ["--cifar10"]),
    ],
)
def test_wrong_words(flags, words):
    refused(run_script("reproduce.py", *flags), *words)
