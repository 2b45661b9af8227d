"""Commands with wrong words, broken files and impossible numbers; evaluate and predict."""

import csv
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table

from equivalence_tests.program.command import ROOT, refused, run_script, train
from flax_resnet import errors
from flax_resnet.commands import cli, predict
from flax_resnet.config import USED_WITH, TrainConfig, idle, to_dict
from flax_resnet.data import sources
from flax_resnet.data.workers import WorkerDied
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import load_run, predict_files
from flax_resnet.recipes import RECIPES
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.display import Display
from flax_resnet.training import guard
from flax_resnet.training.fit import fit
from flax_resnet.training.guard import NonFiniteLoss
from flax_resnet.training.progress import Interrupted

CLASSES = ("ant", "bee")


def write_folder(root, *, per_class=12, splits=("train", "test"), size=12):
    """Class folders of small PNGs; bees are brighter than ants."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                pixels = rng.integers(0, 100, (size, size, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("insects"))


@pytest.fixture(scope="module")
def insects(folder, tmp_path_factory):
    """The directory of a run on ants and bees."""
    run_dir = tmp_path_factory.mktemp("run") / "insects"
    outcome = train_on(folder, run_dir, "--epochs", 4)
    assert outcome.status == 0, outcome.err
    return run_dir


def train_on(folder, run_dir, *arguments):
    arguments = ["--dataset", f"folder:{folder}", "--batch-size", 8, *arguments]
    return run_script(
        "train.py", "--arch", "basic_cnn", "--devices", 1, "--run-dir", run_dir, *arguments,
        "--optimizer", "adam", "--lr", 0.003,
    )  # fmt: skip


WRONG_WORDS = [
    (["--arch", "resnet19"], ["--arch", "resnet19", "resnet1"]),
    (["--epohcs", "3"], ["--epohcs", "--epochs"]),
    (["--optimizer", "sdg"], ["sdg", "'sgd'"]),
    (["--dataset", "digts"], ["error: unknown data set 'digts'", "'digits'"]),
    (["--image-size", "9", "--resize-size", "8"], ["error: --resize-size is smaller"]),
    (["--dataset", "floder:x"], ["floder", "'folder:'"]),
    (["--epochs", "ten"], ["--epochs", "ten"]),
    (["--epochs", "0"], ["--epochs", "0"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--dropout", "1"], ["--dropout"]),
    (["--num-classes", "1000000000"], ["--num-classes"]),
    (["--num-classes", "7"], ["--num-classes 7", "10 classes"]),
    (["--stem", "cifar", "--arch", "resnet20"], ["own stem"]),
    (["--batch-size", "5000"], ["5000", "training split"]),
    (["--mean", "0.5"], ["--mean and --std"]),
    (["--mean", "nan", "--std", "1"], ["--mean", "nan"]),
    (["--mean", "inf", "--std", "1"], ["--mean", "inf"]),
    (["--mean", "1", "1", "--std", "1", "1"], ["2 values", "1 channels"]),
    (["--mean", "1", "--std", "1", "1"], ["std has 2 values", "1 channels"]),
    (["--image-size", "7"], ["basic_cnn", "8x8", "7x7", "image_size 7"]),
    (["--arch", "resnet18", "--batch-size", "1"], ["BatchNorm", "batch_size 1"]),
    (["--test-fraction", "0"], ["digits", "no test split", "--test-fraction"]),
    (["--new-head"], ["--new-head", "--init-from"]),
    (["--freeze-backbone"], ["--freeze-backbone", "--init-from"]),
    (["--zero-init-residual"], ["--zero-init-residual", "basic_cnn"]),
    (["--dataset", "tfds:mnist", "--on-bad-image", "skip"], ["--on-bad-image", "tfds:mnist"]),
    (["--cycle-momentum", "--schedule", "cosine"], ["--cycle-momentum", "onecycle", "cosine"]),
    (["--cycle-momentum", "--momentum", "0"], ["--cycle-momentum", "sgd", "--momentum 0"]),
    (["--deterministic", "--parallel", "pmap"], ["--deterministic", "--parallel jit"]),
    (["--shard-parameters", "--parallel", "pmap"], ["--shard-parameters", "--parallel jit"]),
    (["--cache", "device", "--random-resized-crop"], ["--random-resized-crop", "--cache device"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite", "exclude"]),
    (["--patience", "2", "--validation-fraction", "0"], ["validation"]),
    (["--monitor", "validation_accuracy", "--validation-fraction", "0"], ["monitor", "split"]),
    (["--dataset", str(ROOT)], ["did you mean", f"folder:{ROOT}"]),
    (["--devices", "99"], ["99"]),
    (["--recipe", "cifar10-resnet19"], ["recipe"]),
    (["--config", "no-such-file.json"], ["no-such-file.json"]),
    (["--dataset", "folder:caf\udce9"], ["--dataset", "not in UTF-8", r"caf\udce9"]),
    (["--dataset", "folder:no-such-folder"], ["no-such-folder"]),
    (["--dataset", "folder:~no-such-user/a"], ["no-such-user"]),
    (["--dataset", "cifar10:~no-such-user/a"], ["no-such-user"]),
    (["--connect-timeout", "0"], ["--connect-timeout", "at least 1"]),
    (["--dataset", "tfds:no_such_set"], ["no_such_set"]),
    (["--init-from", "no-such-run"], ["no-such-run"]),
    (["--resume", "--overwrite", "extra"], ["extra"]),
    (["--schedule", "cosine", "--milestones", "3"], ["milestones", "cosine", "multistep"]),
    (["--beta1", "0.5"], ["--beta1", "sgd", "--optimizer adam or adamw"]),
    (["--warmup-factor", "0.5"], ["--warmup-factor", "--warmup-epochs above 0"]),
    (["--schedule", "multistep", "--milestones", "9", "3"], ["--milestones", "later", "9 3"]),
    (["--schedule", "step", "--step-epochs", "9999999999"], ["--step-epochs", "100000"]),
    (["--schedule", "multistep", "--milestones", "1000000000000000000"], ["--milestones"]),
    (["--eval-batch-size", "1000000000000"], ["--eval-batch-size", "1000000"]),
    (["--lr", "1e300"], ["--lr", "less than or equal to 1000", "1e300"]),
    (["--l1", "1e-320"], ["--l1", "float32"]),
    (["--optimizer", "adam", "--eps", "1e-50"], ["--eps", "1e-50", "greater than or equal"]),
    (["--beta2", "0.9999999999", "--optimizer", "adam"], ["--beta2", "0.999999"]),
]


@pytest.mark.parametrize("arguments,words", WRONG_WORDS, ids=lambda x: " ".join(x)[:40])
def test_wrong_words_are_one_line_and_leave_nothing(tmp_path, arguments, words):
    outcome = run_script(
        "train.py", "--arch", "basic_cnn", "--run-dir", tmp_path / "run", "--devices", 1, *arguments
    )
    refused(outcome, *words)
    assert not list(tmp_path.iterdir())


def test_one_fault_is_one_complaint():
    with pytest.raises(InputError, match=r"^--milestones: [^;]* got '0'$"):
        cli.merge(TrainConfig(), {"schedule": {"milestones": ["0"]}})


OTHERS = {"optimizer": ("sgd", "adam"), "schedule": ("constant",), "cache": ("none",)}
OTHERS |= {"dataset": ("digits",)}
CHANGED = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 or 0.5}
CHANGED |= {str: lambda x: "skip", list: lambda x: [7]}


@pytest.mark.parametrize("name", USED_WITH)
def test_a_setting_without_effect_is_named(name):
    """The message names the settings that would use it; the default value is no fault."""
    groups = {g: v for g, v in to_dict(TrainConfig()).items() if isinstance(v, dict)}
    default = next(values[name] for values in groups.values() if name in values)
    changed = CHANGED[type(default)](default)
    other, *users = USED_WITH[name]

    def faults_with(value):
        asked = {name: changed, other: value}
        nested = {g: {n: asked[n] for n in asked.keys() & v} for g, v in groups.items()}
        return idle(cli.merge(TrainConfig(), nested))

    passed_over = next(value for value in OTHERS.get(other, (0,)) if value not in users)
    assert all(word in faults_with(passed_over)[name] for word in (other, *users))
    for value in users or [1]:
        assert name not in faults_with(f"{value}:x" if other == "dataset" else value)


def with_flags(base, *flags):
    parser = cli.Parser()
    cli.add_config_flags(parser)
    return cli.with_flags(base, parser.parse_args(flags))


@pytest.mark.parametrize("name", RECIPES)
def test_a_flag_takes_the_effect_of_what_a_recipe_says_without_a_word(name):
    """A flag may switch off a recipe's setting, but not a setting given as another flag."""
    recipe = RECIPES[name].config
    assert not idle(recipe) and with_flags(recipe) == recipe
    changed = with_flags(recipe, "--schedule", "constant", "--optimizer", "adam")
    assert not idle(changed) and changed.optimizer.lr == recipe.optimizer.lr
    assert "gamma" in idle(with_flags(recipe, "--schedule", "constant", "--gamma", "0.7"))


def test_too_little_memory_is_one_line(capsys):
    def main():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with pytest.raises(SystemExit) as left:
        cli.run_command(main)
    error = capsys.readouterr().err
    assert left.value.code == 1 and error.count("\n") == 1
    assert all(word in error for word in ("out of memory", "--batch-size", "--accumulate-steps"))


def no_place(number):
    return OSError(number, os.strerror(number), "runs/a")


@pytest.mark.parametrize(
    "error,status,words",
    [
        (InputError("a\nb \x1b[1m\u202e"), 2, r"error: a b \x1b[1m\u202e"),
        (cli.CheckFailed("no"), 1, "failed: no"),
        (NonFiniteLoss("step 3"), 1, "failed: step 3"),
        (Interrupted(signal.SIGHUP), 129, "SIGHUP; the work is saved, go on with --resume"),
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError(), 1, "--cache none"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 1, "out of memory"),
        (no_place(errno.EDQUOT), 2, "error: runs/a: Disk quota exceeded"),
        (no_place(errno.EIO), 2, "error: runs/a: Input/output error"),
        (no_place(errno.EMFILE), 1, "Too many open files"),
        (no_place(errno.ENOLCK), 1, "No locks available"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not in UTF-8"),
        (WorkerDied("killed"), 1, "failed: killed"),
        (RuntimeError("Unable to initialize backend 'cuda': no"), 2, "error: Unable"),
    ],
)
def test_every_error_is_a_line_and_a_status(capsys, error, status, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run_command(main)
    line = capsys.readouterr().err
    assert left.value.code == status and words in line and line.count("\n") == 1


@pytest.mark.parametrize("in_a_run", [True, False])
def test_an_error_that_nobody_has_foreseen_is_a_line_and_a_log(tmp_path, monkeypatch, in_a_run):
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))
    error = jax.errors.JaxRuntimeError("INTERNAL: a fault of the program")
    error.add_note("what JAX adds")
    if in_a_run:
        error.run_dir = tmp_path
    status, line = errors.verdict(error)
    (log,) = tmp_path.iterdir()
    assert (
        status == 1
        and "this is a bug: JaxRuntimeError: INTERNAL" in line
        and str(log) in line
        and "\n" not in line
    )
    assert "a fault of the program" in log.read_text()
    assert (log.name == errors.LOG) == in_a_run


def piped(*arguments, shell: str) -> subprocess.CompletedProcess:
    """Runs a shell command line in which "$@" is `python scripts/train.py ARGUMENTS`."""
    command = [sys.executable, "scripts/train.py", *map(str, arguments)]
    line = ["bash", "-o", "pipefail", "-c", shell, "bash", *command]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("shell", ['"$@" | head -1', '"$@" >&- 2>&-'])
def test_a_closed_pipe_is_no_error(shell):
    outcome = piped("--list-recipes", shell=shell)
    assert (outcome.returncode, outcome.stderr) == (0, "")


def test_a_training_goes_on_without_its_output(tmp_path):
    flags = ["--smoke", "--arch", "basic_cnn", "--run-dir", tmp_path / "run"]
    outcome = piped(*flags, shell='"$@" | head -1')
    assert (outcome.returncode, outcome.stderr) == (0, ""), outcome
    assert outcome.stdout and (tmp_path / "run" / "report.json").exists()


def test_output_that_cannot_be_written_is_a_failure_unless_something_is_trained(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise no_place(errno.ENOSPC)

    dropped = []
    monkeypatch.setattr("flax_resnet.runs.display.drop_output", dropped.append)
    display = Display(Console(file=Full()))
    with pytest.raises(OSError):
        display.say("a table")
    display.start(total_steps=1, done_steps=0, batch_size=1)
    display.say("epoch 1")
    display.say("epoch 2")
    assert len(dropped) == 1


def test_what_steers_a_terminal_is_escaped_in_lines_and_tables():
    file = io.StringIO()
    display = Display(Console(file=file, soft_wrap=True, width=80))
    table = Table("class")
    table.add_row("b\x1b[2Jee\u202e")
    display.say("left out: a\x1b[31m \x07[red].png \udce9")
    display.show(table)
    out = file.getvalue()
    assert "\x1b" not in out and "\u202e" not in out
    assert r"left out: a\x1b[31m" in out and "[red].png \udce9" in out
    assert r"b\x1b[2Jee\u202e" in out


def test_a_terminal_without_a_character_shows_its_code(monkeypatch):
    class Ascii(io.TextIOWrapper):
        def close(self):
            pass

    out = Ascii(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as left:
        cli.run_command(lambda: print("caf\xe9 \udce9"))
    assert not left.value.code and out.buffer.getvalue() == b"caf\\xe9 \xe9\n"


def test_a_real_process_says_the_same():
    command = [sys.executable, "scripts/train.py", "--arch", "resnet19"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and "did you mean" in outcome.stderr


def test_an_existing_run_is_kept(insects, folder):
    before = (insects / "report.json").read_bytes()
    refused(train_on(folder, insects), "--resume", "--overwrite")
    assert (insects / "report.json").read_bytes() == before


def test_overwrite_replaces_a_run(folder, tmp_path):
    assert train_on(folder, tmp_path / "run", "--epochs", 1).status == 0
    assert train_on(folder, tmp_path / "run", "--epochs", 2, "--overwrite").status == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["epochs"] == 2
    assert len(list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))) == 2


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_other_directories_are_left_alone(folder, tmp_path, flag):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(train_on(folder, tmp_path, flag), "is no run")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_refuses_other_flags(insects):
    for flag, value, own in (("--epochs", 9, "epochs 9 (the run has 4)"),
                              ("--dataset", "digits", "data.dataset 'digits'")):  # fmt: skip
        outcome = run_script("train.py", "--resume", "--run-dir", insects, flag, value)
        refused(outcome, "other flags", own, "--init-from")


def test_resume_alone_names_the_runs_that_could_be_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run_script("train.py", "--resume"), "--resume needs --run-dir")
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    refused(run_script("train.py", "--resume"), "runs/ holds runs/one, runs/two")


def test_resume_refuses_another_recipe_and_config(insects, tmp_path):
    """The run's own config is accepted."""
    other = json.loads((insects / "config.json").read_text()) | {"seed": 7}
    (tmp_path / "other.json").write_text(json.dumps(other))
    for begun in (
        ["--recipe", "imagenette-cnn"],
        ["--config", tmp_path / "other.json"],
        ["--smoke"],
    ):
        refused(run_script("train.py", "--resume", "--run-dir", insects, *begun), "other flags")
    outcome = run_script(
        "train.py", "--resume", "--run-dir", insects, "--config", insects / "config.json"
    )
    assert outcome.status == 0 and "finished" in outcome.out


@pytest.mark.parametrize("name", ["cifar10-fast", "imagenette-cnn"])
def test_the_command_that_began_a_recipe_resumes_it(tmp_path, name):
    """Settings that the recipe leaves open, and the run has filled in, are no difference."""
    data = replace(RECIPES[name].config.data, dataset="folder:x", resize_size=99)
    data = replace(data, mean=data.mean or (0.5,) * 3, std=data.std or (1.0,) * 3)
    own = replace(RECIPES[name].config, data=data, epochs=3)
    own = replace(own, augment=replace(own.augment, random_crop=own.augment.random_crop or 0))
    RunDirectory(tmp_path / "run").write_config(own)
    flags = ["--recipe", name, "--dataset", "folder:x", "--resume", "--run-dir", tmp_path / "run"]
    refused(run_script("train.py", *flags, "--epochs", 3), "folder:x: no such folder")
    refused(run_script("train.py", *flags), "other flags")


@pytest.mark.parametrize("content", [b"", b"<html>", None], ids=["empty", "no image", "truncated"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_images_are_named_or_left_out(tmp_path, split, content):
    """Images of the test split are read too, before the training begins."""
    root = write_folder(tmp_path / "data")
    broken = root / split / "bee" / "05.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    refused(train_on(root, tmp_path / "run"), str(broken))
    assert not (tmp_path / "run").exists()
    (root / split / "bee" / "note.heic").write_text("no name of an image")
    outcome = train_on(root, tmp_path / "run", "--on-bad-image", "skip", "--epochs", 1)
    assert outcome.status == 0 and f"left out: {broken}" in outcome.out
    assert "passed over: 1 file(s)" in outcome.out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["left_out_images"] == 1


def test_a_broken_image_of_an_uncached_set_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "bee" / "05.png").write_bytes(b"")
    refused(train_on(root, tmp_path / "run", "--cache", "none"), "05.png")


def test_a_class_without_images_is_named(tmp_path):
    root = write_folder(tmp_path / "data")
    (root / "train" / "cow").mkdir()
    refused(train_on(root, tmp_path / "run"), "cow")


@pytest.mark.parametrize("lr", ["1e30"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, lr):
    outcome = train(tmp_path / "run", "--optimizer", "sgd", "--lr", lr, "--schedule", "constant")
    assert outcome.status == 1
    assert "step 2" in outcome.err and "--lr" in outcome.err
    assert "there is no checkpoint yet; begin again" in outcome.err
    assert "--init-from" not in outcome.err
    assert outcome.err.count("\n") == 1


def test_it_names_the_checkpoint_to_go_on_from():
    error = guard.fault_of_step(21, {"loss": 2, "gradient_norm": 3}, 20, "run")
    words = ("step 21", "last finite loss 2,", "checkpoint of step 20 in run; `init_from` it in")
    assert all(part in str(error) for part in words)


@pytest.mark.parametrize(
    "finite, before, allowed, expected",
    [
        ([True, False, False], 0, 0, (1, 1)),
        ([True, False, False], 0, 1, (2, 2)),
        ([True, False, False], 0, 2, (None, 2)),
        ([False, True], 1, 1, (0, 2)),
        ([True, True], 5, 0, (None, 0)),
    ],
)
def test_the_guard_stops_at_the_first_step_too_many(finite, before, allowed, expected):
    rows = [{"finite": each} for each in finite]
    assert guard.first_fault(rows, before, allowed) == expected


@pytest.mark.parametrize("epochs,words", [(1, "loss after epoch 1"), (2, "epoch 2: no step")])
def test_a_run_whose_skipped_steps_leave_no_numbers_has_no_report(tmp_path, epochs, words):
    """The first update is finite and enormous; all later gradients are skipped."""
    outcome = train(
        tmp_path / "run", "--optimizer", "sgd", "--lr", 1e10, "--skip-nonfinite", 1000,
        "--schedule", "constant", "--epochs", epochs,
    )  # fmt: skip
    assert outcome.status == 1 and words in outcome.err and outcome.err.count("\n") == 1, outcome
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of a few megabytes."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # a writer may end late


def test_a_disk_too_small_is_told_before_anything_is_written(tiny_disk):
    refused(train(tiny_disk / "run"), "no space left", "MB")
    assert not list(tiny_disk.iterdir())


def test_a_disk_that_fills_up_is_told_in_one_line(tiny_disk, monkeypatch):
    monkeypatch.setattr("flax_resnet.training.fit.check_space", lambda *_: None)
    refused(train(tiny_disk / "run"), "no space left")


def test_evaluate_repeats_the_report(insects, tmp_path):
    report = json.loads((insects / "report.json").read_text())
    for split in ("test", "validation", "train"):
        outcome = run_script(
            "evaluate.py", insects, "--split", split, "--json", tmp_path / "out.json"
        )
        assert outcome.status == 0, outcome.err
        figures = json.loads((tmp_path / "out.json").read_text())
        assert figures["images"] == {"test": 24, "validation": 3, "train": 21}[split]
        for name, value in report["splits"][split].items():
            assert figures[name] == pytest.approx(value, abs=1e-6)


def test_evaluate_takes_another_set_with_the_same_classes(insects, tmp_path):
    other = write_folder(tmp_path / "other", splits=("train", "val", "test"), per_class=5)
    outcome = run_script(
        "evaluate.py", insects, "--dataset", f"folder:{other}", "--split", "all",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 30


def test_evaluate_names_what_it_leaves_out(tmp_path):
    root = write_folder(tmp_path / "data")
    assert train_on(root, tmp_path / "run", "--on-bad-image", "skip", "--epochs", 1).status == 0
    other = write_folder(tmp_path / "other", splits=("train", "val", "test"), per_class=5)
    (other / "test" / "bee" / "00.png").write_bytes(b"")
    flags = ["--dataset", f"folder:{other}", "--json", tmp_path / "out.json"]
    outcome = run_script("evaluate.py", tmp_path / "run", *flags)
    assert outcome.status == 0 and "left out: " in outcome.out and "00.png" in outcome.out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["images"], figures["left_out_images"]) == (9, 1)


def test_evaluate_takes_all_of_a_set_too_small_to_split(insects, tmp_path):
    other = write_folder(tmp_path / "other", splits=(".",), per_class=1)
    outcome = run_script("evaluate.py", insects, "--dataset", f"folder:{other}", "--split", "all")
    assert outcome.status == 0, outcome.err
    assert f"all: 2 images of folder:{other}" in outcome.out


def test_evaluate_refuses_what_does_not_fit(insects, tmp_path):
    refused(run_script("evaluate.py", insects, "--split", "tset"), "tset", "'test'")
    refused(run_script("evaluate.py", insects, "--dataset", "digts"), "digts", "'digits'")
    refused(run_script("evaluate.py", tmp_path), "config.json")
    refused(run_script("evaluate.py", insects, "--dataset", "digits"), "ant", "classes")


@pytest.fixture
def some_bad(tmp_path, folder):
    """A copy of the folder of bees in which two files are no images."""
    shutil.copytree(folder / "test" / "bee", tmp_path / "photos")
    for name in ("03.png", "05.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    return tmp_path / "photos"


def test_evaluate_masks_what_cannot_be_read(insects, folder, tmp_path):
    """Unreadable images are masked with --on-bad-image skip; otherwise all are named."""
    shutil.copytree(folder, tmp_path / "data")
    for name in ("test/bee/03.png", "test/ant/05.png"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    flags = ["--dataset", f"folder:{tmp_path}/data"]
    refused(run_script("evaluate.py", insects, *flags), "05.png", "03.png", "--on-bad-image skip")
    outcome = run_script("evaluate.py", insects, *flags, "--on-bad-image", "skip", "--json", "-")
    assert outcome.status == 0 and outcome.err.count("left out: ") == 2
    assert "top 2" in outcome.err and "top 5" not in outcome.err
    figures = json.loads(outcome.out)
    assert (figures["images"], figures["left_out_images"]) == (22, 2)
    assert "05.png: not a readable image" in figures["left_out"][0]
    for name in ("test/bee/03.png", "test/ant/05.png"):
        (tmp_path / "data" / name).unlink()
    outcome = run_script("evaluate.py", insects, *flags, "--json", "-")
    assert json.loads(outcome.out)["loss"] == pytest.approx(figures["loss"], rel=1e-6)


def test_predict_names_all_that_cannot_be_read(insects, some_bad, tmp_path):
    out = tmp_path / "out.json"
    outcome = run_script("predict.py", insects, some_bad, "--json", out)
    refused(outcome, "03.png", "05.png", "--on-bad-image skip")
    assert not out.exists() and not list(tmp_path.glob(".*tmp"))


def test_predict_lists_what_cannot_be_read(insects, some_bad, tmp_path):
    files = [tmp_path / "out.json", tmp_path / "out.csv"]
    flags = ["--on-bad-image", "skip", "--json", files[0], "--csv", files[1]]
    outcome = run_script("predict.py", insects, some_bad, *flags)
    assert outcome.status == 0 and "left out: 2 of 12 images" in outcome.err
    rows = json.loads(files[0].read_text())
    assert len(rows) == 12 and [i for i, row in enumerate(rows) if "error" in row] == [3, 5]
    assert rows[3]["error"] == "not a readable image (no known format)"
    with files[1].open() as file:
        faults = [row["image"] for row in csv.DictReader(file) if row["error"]]
    assert faults == [rows[3]["image"], rows[5]["image"]]
    outcome = run_script("predict.py", insects, some_bad, "--on-bad-image", "skip")
    assert outcome.status == 0 and "03.png: not a readable image" in outcome.out


def test_predict_replaces_nothing_that_it_reads(insects, some_bad, tmp_path):
    image = next(path for path in sorted(some_bad.rglob("*.png")))
    for output in (image, insects / "report.json"):
        refused(
            run_script("predict.py", insects, some_bad, "--json", output), "is one of the files"
        )
    refused(run_script("evaluate.py", insects, "--json", insects / "a.json"), "is one of the files")
    same = [tmp_path / "out", "--csv", tmp_path / "elsewhere" / ".." / "out"]
    (tmp_path / "elsewhere").mkdir()
    refused(run_script("predict.py", insects, some_bad, "--json", *same), "both name")


def test_predict_fails_where_no_image_can_be_read(insects, tmp_path):
    (tmp_path / "a.png").touch()
    outcome = run_script("predict.py", insects, tmp_path, "--on-bad-image", "skip")
    assert outcome.status == 1 and "no image can be read" in outcome.err


def test_how_a_run_is_evaluated_may_change(insects):
    outcome = run_script("train.py", "--resume", "--run-dir", insects, "--eval-batch-size", 7)
    assert outcome.status == 0 and "nothing to do" in outcome.out


def test_predict_writes_to_standard_output_and_nothing_else_there(insects, some_bad, tmp_path):
    flags = ["--on-bad-image", "skip"]
    rows = json.loads(run_script("predict.py", insects, some_bad, *flags, "--json", "-").out)
    table = run_script("predict.py", insects, some_bad, *flags, "--csv", "-").out
    assert len(rows) == 12 and len(list(csv.DictReader(table.splitlines()))) == 2 + 10 * 2
    assert json.dumps(rows, indent=2) + "\n" == run_script(
        "predict.py", insects, some_bad, *flags, "--json", "-"
    ).out  # fmt: skip
    refused(run_script("predict.py", insects, some_bad, "--json", "-", "--csv", "-"), "both")
    assert not Path("-").exists()


def test_predict_prints_each_row_when_it_comes(capsys, monkeypatch):
    """Rows are not collected: in a table, each further row cost more than the one before."""
    likely = [{"class": "ant", "probability": 0.5}]

    def rows():
        for number in range(3):
            yield {"image": f"{number}.png", "predictions": likely}
            assert capsys.readouterr().out == f"{number}.png: ant 50.0%\n"

    assert predict.write_all(rows(), None, None) == 0


def test_predict_says_what_lies_on_its_side(insects, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, header in (("one.jpg", exif), ("two.jpg", Image.Exif())):
        Image.new("RGB", (12, 16)).save(tmp_path / name, exif=header)
    outcome = run_script("predict.py", insects, tmp_path, "--json", "-")
    assert outcome.status == 0 and len(json.loads(outcome.out)) == 2
    assert "1 of 2 images carry an EXIF rotation that is not applied; the run was" in outcome.err


def test_a_run_turns_images_as_it_learned_to(insects, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    paths = [tmp_path / "turned.png", tmp_path / "upright.png"]
    run = load_run(insects)
    turning = replace(run, config=cli.merge(run.config, {"data": {"exif_transpose": True}}))
    one, two = (p for _, p in predict_files(turning, paths))
    np.testing.assert_array_equal(one, two)
    one, two = (p for _, p in predict_files(run, paths))
    assert np.abs(one - two).max() > 1e-4


def test_predict_files_keeps_few_images_in_memory(insects, folder):
    """The first outcome comes after a few images are read, however many there are."""
    run = load_run(insects)
    run = replace(run, config=cli.merge(run.config, {"eval_batch_size": 4}))
    picture = folder / "test" / "bee" / "00.png"
    with mock.patch.object(sources, "read_image", wraps=sources.read_image) as read:
        outcomes = predict_files(run, [picture] * 200)
        next(outcomes)
        assert read.call_count <= 8
        assert len(list(outcomes)) == 199
    with pytest.raises(InputError, match="takes a list of paths"):
        next(predict_files(run, picture))


@pytest.mark.parametrize("images, word", [
    (np.zeros((2, 12, 12, 3), np.float32), "float32"), (np.zeros((2, 9, 9, 3), np.uint8), "9, 9"),
    (np.zeros((2, 3, 12, 12), np.uint8), "3, 12"), (np.zeros((12, 12, 3), np.uint8), "12, 12, 3"),
    ([[0]], "list"),
])  # fmt: skip
def test_logits_are_of_images_as_the_run_knows_them(insects, images, word):
    run = load_run(insects)
    for number in (2, 0):
        assert run.logits(np.zeros((number, 12, 12, 3), np.uint8)).shape == (number, 2)
    with pytest.raises(InputError, match=r"images are uint8 \[B, 12, 12, 3\].*" + word):
        run.logits(images)


def test_predict_writes_names_and_probabilities(insects, folder, tmp_path):
    picture, bees = folder / "test" / "ant" / "00.png", folder / "test" / "bee"
    outcome = run_script(
        "predict.py", insects, picture, bees, "--top-k", 2,
        "--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["image"] for row in rows][0] == str(picture) and len(rows) == 13
    for row in rows:
        likely = [p["probability"] for p in row["predictions"]]
        assert likely == sorted(likely, reverse=True) and sum(likely) == pytest.approx(1, abs=1e-5)
        assert {p["class"] for p in row["predictions"]} == set(CLASSES)
    right = [row["predictions"][0]["class"] == row["image"].split("/")[-2] for row in rows]
    assert np.mean(right) > 0.9
    table = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert len(table) == 26 and table[0]["class"] == rows[0]["predictions"][0]["class"]


def test_predict_passes_over_hidden_files(insects, folder, tmp_path):
    """Hidden files are `._NAME`, which the Finder writes, and all files in hidden folders."""
    (tmp_path / "photos" / ".trash").mkdir(parents=True)
    shutil.copyfile(folder / "test" / "ant" / "00.png", tmp_path / "photos" / "img[a].png")
    for name in ("._img[a].png", ".trash/old.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    out = tmp_path / "out.json"
    outcome = run_script("predict.py", insects, tmp_path / "photos", "--json", out)
    assert outcome.status == 0, outcome.err
    assert [row["image"] for row in json.loads(out.read_text())] == [
        str(tmp_path / "photos" / "img[a].png")
    ]


def test_predict_follows_links_to_folders_and_counts_what_is_no_image(insects, folder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bees").symlink_to(folder / "test" / "bee")
    for name in ("a.heic", "b.HEIC", "notes"):
        (tmp_path / "photos" / name).write_text("")
    outcome = run_script("predict.py", insects, tmp_path / "photos", "--csv", "-", "--top-k", 1)
    pictures = [line.split(",")[0] for line in outcome.out.splitlines()[1:]]
    expected = sorted((folder / "test" / "bee").iterdir())
    assert pictures == [str(tmp_path / "photos" / "bees" / path.name) for path in expected]
    line = "passed over: 3 file(s) not named as images: 2 .heic, 1 no suffix"
    assert outcome.err.splitlines() == [line]
    (tmp_path / "photos" / "bees").unlink()
    outcome = run_script("predict.py", insects, tmp_path / "photos")
    refused(outcome, "photos has no images in it", line)
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    refused(run_script("predict.py", insects, tmp_path / "photos"), "a folder that contains it")


def test_predict_prints_a_table(insects, folder):
    outcome = run_script("predict.py", insects, folder / "test" / "bee")
    assert outcome.status == 0 and "bee" in outcome.out and "%" in outcome.out


def test_predict_names_files_that_are_not_utf8(insects, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(next((folder / "test" / "bee").iterdir()), picture)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert "caf\\udce9.png: " in run_script("predict.py", insects, picture).out
    assert picture in run_script("predict.py", insects, picture, "--csv", "-").out
    for kind in ("--csv", "--json"):
        assert run_script("predict.py", insects, picture, kind, f"out{kind}").status == 0
    assert picture in Path("out--csv").read_text(errors="surrogateescape")
    assert json.loads(Path("out--json").read_text())[0]["image"] == picture


def test_predict_refuses_what_is_no_image(insects, folder, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    target = tmp_path / "out.json"
    refused(run_script("predict.py", insects, tmp_path / "note.png", "--json", target), "note.png")
    refused(run_script("predict.py", insects, tmp_path / "gone.png"), "gone.png")
    refused(run_script("predict.py", insects, tmp_path / "run"), "run")
    assert not target.exists()


@pytest.mark.parametrize(
    "script,flag", [("evaluate.py", "--json"), ("predict.py", "--json"), ("predict.py", "--csv")]
)
def test_where_nothing_can_be_written_is_told_first(tmp_path, script, flag):
    """The output is checked before the run, which does not exist here."""
    inputs = ["image.png"] if script == "predict.py" else []
    for place, words in (
        (tmp_path / "gone" / "out", "gone does not exist"),
        (tmp_path, "is a dir"),
    ):
        refused(run_script(script, tmp_path, *inputs, flag, place), flag, words)


def test_a_run_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refused(train(tmp_path / "file" / "sub"), "file/sub", "Not a directory")


def test_help_explains_every_flag():
    outcome = run_script("train.py", "--help")
    assert outcome.status == 0
    for word in ("--label-smoothing", "(default: 0.04)", "--no-nesterov", "Share of the target"):
        assert word in outcome.out
    assert "--lr FLOAT" in outcome.out and " TEXT" not in outcome.out


def test_every_help_text_stands_alone_and_names_flags():
    parser = cli.Parser()
    cli.add_config_flags(parser)
    for action in parser._actions:
        first = action.help.split()[0]
        assert first not in ("Of", "What", "Where", "Which", "How", "Left"), action.help
        assert "`" not in action.help and "init_from" not in action.help


def test_a_command_that_infers_settings_shows_no_defaults_of_the_training():
    parser = cli.Parser()
    cli.add_config_flags(parser, ("arch",))
    assert "basic_cnn" in parser.format_help() and "(default:" not in parser.format_help()


@pytest.mark.parametrize("script,words", [("train", "[flags]"), ("convert", "IN OUT [flags]")])
def test_help_says_first_what_a_command_does(script, words):
    out = run_script(f"{script}.py", "--help").out
    about, usage = (
        out.index(f"python scripts/{script}.py"),
        out.index(f"usage: {script}.py {words}"),
    )
    assert out[0].isupper() and about < usage


def test_the_library_names_settings_and_the_commands_flags(tmp_path):
    config = cli.merge(TrainConfig(), {"parallel": {"parallel": "pmap", "shard_parameters": True}})
    with pytest.raises(InputError, match="`shard_parameters`: pmap") as error:
        fit(config, tmp_path / "run")
    assert "--" not in str(error.value)
    outcome = run_script("train.py", "--parallel", "pmap", "--shard-parameters")
    refused(outcome, "--shard-parameters: pmap")
    assert cli.as_flags("a smaller `batch_size`; `x y`") == "a smaller --batch-size; `x y`"
