"""The benchmark at a tiny size: its files, and its refusal to time two different programs."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from equivalence_tests.benchmark import (
    decoding,
    end_to_end,
    fresh_process,
    gpu,
    lowerings,
    measured,
    startup,
    throughput,
    timing,
)
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.test_throughput import evaluated
from equivalence_tests.program.test_workers import is_there
from equivalence_tests.studies import card_precision
from flax_resnet.commands import cli, exits
from flax_resnet.commands.main import COMMANDS
from flax_resnet.config import TrainConfig
from flax_resnet.devices import targets
from flax_resnet.errors import InputError
from flax_resnet.runs import environment
from torch_ref import train as torch_train

TINY = "--arch resnet20 --image-size 8 --batch-size 4 --rounds 1 --blocks 1 --steps 1 --warmup 1"
FLAGS = [*TINY.split(), "--modes", "inference", "--variants", "jit", "eager", "--device", "cpu"]
FIELDS = {
    "framework", "variant", "mode", "arch", "dtype", "device", "batch_size",
    "images_per_second", "ms_per_step", "compile_seconds", "peak_memory_bytes",
}  # fmt: skip


def test_the_clock_of_decoding_starts_when_reading_ahead_is_over():
    batches, seen = iter(range(9)), []
    images = decoding.rate(batches, 3, 4, clock=lambda: seen.append(next(batches)) or len(seen) / 2)
    assert seen == [3, 8] and images == 4 * decoding.BATCH_SIZE / 0.5


@pytest.mark.slow  # six processes, each with its imports and compilations
def test_it_times_both_and_writes_the_public_fields(tmp_path):
    outcome = run_script("benchmark.py", *FLAGS, "--json", tmp_path / "speed.json")
    assert outcome.status == 0, outcome.err
    document = json.loads((tmp_path / "speed.json").read_text())
    assert {(r["framework"], r["variant"]) for r in document["rows"]} == {
        ("jax", "jit"), ("torch", "eager"),
    }  # fmt: skip
    for row in document["rows"]:
        assert row.keys() >= FIELDS and row["images_per_second"] > 0
    assert document["ceilings"] and document["environment"]["revision"]
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.control
def test_two_different_networks_are_not_timed(tmp_path, monkeypatch):
    """Negative control: weights of one layer are a thousandth off on one side.

    The jobs run in this process.
    """
    original = throughput.weight_files

    def spoiled(*arguments):
        files = original(*arguments)
        arrays = dict(np.load(files["torch"]))
        arrays["conv1.weight"] *= 1.001
        np.savez(files["torch"], **arrays)
        return files

    monkeypatch.setattr(throughput, "weight_files", spoiled)
    monkeypatch.setattr(fresh_process, "execute", lambda job, cache: evaluated(job))
    outcome = run_script("benchmark.py", *FLAGS, "--json", tmp_path / "speed.json")
    assert outcome.status == 1 and outcome.err.startswith("failed: logits disagree"), outcome
    assert "round 1" not in outcome.out + outcome.err and not list(tmp_path.iterdir())


@pytest.mark.slow  # four trainings in processes of their own
def test_whole_trainings_are_timed_too(tmp_path):
    flags = "--arch basic_cnn --image-size 8 --batch-size 64 --rounds 1 --epochs 2 --device cpu"
    flags += " --modes end_to_end time_to_accuracy --target-accuracy 0.2 --workers 0"
    outcome = run_script("benchmark.py", *flags.split(), "--json", tmp_path / "speed.json")
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(r["mode"], r["framework"]) for r in rows] == [
        (mode, framework) for mode in end_to_end.MODES for framework in ("jax", "torch")
    ]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(row["epochs"] == [2] for row in rows if row["mode"] == "end_to_end")


def called(script: str, words, monkeypatch) -> tuple[dict, argparse.Namespace]:
    """The names in a command's module, and the parsed command line."""
    names = vars(importlib.import_module(COMMANDS[Path(script).stem][0]))
    monkeypatch.setattr(sys, "argv", [script, *words])
    return names, names["parse"]()


def test_a_recipe_sets_both_trainings_and_flags_have_precedence(monkeypatch, tmp_path):
    words = "--recipe cifar10-fast --dataset digits --epochs 2 --device gpu".split()
    benchmark, args = called("benchmark.py", words, monkeypatch)
    settings = benchmark["make_settings"](args)
    job = settings.job
    assert (job.stem, job.batch_size, job.dtype) == ("cifar", 512, "bfloat16")

    _, _, *words = end_to_end.command(replace(job, framework="jax"), settings.course, tmp_path, 3)
    _, args = called("train.py", words, monkeypatch)
    config = cli.build_config(args, TrainConfig())
    assert (config.optimizer.lr, config.epochs, config.data.dataset) == (0.4, 2, "digits")
    words = end_to_end.command(replace(job, framework="torch"), settings.course, tmp_path, 3)
    monkeypatch.setattr(sys, "argv", words[2:])
    args = torch_train.parse()
    twin = cli.build_config(args, TrainConfig())
    assert args.device == "cuda" and config.seed == twin.seed == 3
    assert (twin.optimizer.lr, twin.epochs, twin.data.dataset) == (0.4, 2, "digits")


def test_an_epoch_is_read_when_its_line_is_whole(tmp_path):
    path = tmp_path / "metrics.csv"
    assert end_to_end.read_rows(path) == []
    path.write_text("epoch,validation_accuracy\n1,0.5\n2,0.")
    assert end_to_end.read_rows(path) == [{"epoch": "1", "validation_accuracy": "0.5"}]


def test_time_to_accuracy_is_compared_in_seconds_with_full_caches():
    row = {"mode": "time_to_accuracy", "images_per_second": 9, "empty_cache": [True, False, False]}
    row["seconds_to_accuracy"] = [9.0, 4.0, 2.0]
    assert end_to_end.speed(row) == 1 / 3
    assert end_to_end.speed(row | {"seconds_to_accuracy": [9.0, 4.0, None]}) is None
    assert end_to_end.speed(row | {"seconds_to_accuracy": [None, 4.0, 2.0]}) == 1 / 3
    assert end_to_end.speed(row | {"seconds_to_accuracy": [9.0], "empty_cache": [True]}) == 1 / 9
    assert end_to_end.speed(row | {"mode": "end_to_end"}) == 9


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy", "no-such-package"))
    described = environment.describe(1)
    assert described["no_such_package"] is None and described["numpy"] == np.__version__


def test_the_environment_is_described_before_anything_is_measured(monkeypatch):
    def stop(*_):
        raise InterruptedError

    names, _ = called("benchmark.py", FLAGS, monkeypatch)
    monkeypatch.setattr(throughput, "measure", lambda *_: pytest.fail("measured first"))
    monkeypatch.setattr(environment, "describe", stop)
    with pytest.raises(InterruptedError):
        names["main"]()


def test_nothing_measured_is_no_success(monkeypatch):
    """Without the device nothing is measured; with status 0 a GPU stage would count as done."""
    names, _ = called("benchmark.py", FLAGS, monkeypatch)
    skipped = [{"framework": "jax", "variant": "jit", "mode": "train", "reason": "no GPU"}]
    nothing = {"rows": [], "skipped": skipped, "ratios": {}, "torchvision": {}}
    monkeypatch.setattr(throughput, "measure", lambda *_: dict(nothing))
    with pytest.raises(exits.CheckFailed, match="nothing was measured"):
        names["main"]()


@pytest.mark.slow  # three starts of a training
def test_the_second_start_finds_the_compiled_programs():
    seconds = startup.measure("--arch resnet20 --train-images 64 --batch-size 32".split())
    assert seconds["second"] < seconds["cold"] - 1


@pytest.mark.parametrize("flags, word", [
    (["--arch", "resnet19"], "resnet19"),
    (["--dtype", "float8"], "float8"),
    (["--variants", "jitt"], "jitt"),
    (["--batch-size", "0"], "batch-size"),
    (["--keep", __file__], "no directory"),
    (["--keep", str(Path(__file__).parent)], "which is not this command's"),
    (["--modes", "end_to_ned"], "end_to_end"),
    (["--recipe", "cifar10-fats"], "cifar10-fast"),
])  # fmt: skip
def test_wrong_words_are_one_line(flags, word):
    refused(run_script("benchmark.py", *FLAGS, *flags), word)


def test_every_stage_for_a_gpu_is_understood(tmp_path, monkeypatch):
    """The flags of all stages are valid; the stages themselves need a GPU."""
    programs = set()
    for program, *flags in gpu.stages("folder:images", tmp_path).values():
        programs.add(program)
        if program == "-m":
            if flags[0] == "equivalence_tests.benchmark.lowerings":
                monkeypatch.setattr(sys, "argv", flags)
                assert lowerings.make_job(lowerings.parse()).dtype == "bfloat16"
        else:
            script, args = called(Path(program).name, flags, monkeypatch)
            if program == "scripts/benchmark.py":
                assert script["make_settings"](args).job.device == "gpu"
            else:
                assert script["chosen"](args)
    assert programs == {"-m", "scripts/benchmark.py", "scripts/reproduce.py"}


def test_a_program_is_compiled_for_a_card_and_runs_where_it_is(monkeypatch):
    """The card is a CPU here: steps change the state, and each gets that of the one before."""
    monkeypatch.setattr(measured, "STEPS", 2)
    case = measured.Case("basic_cnn", None, 10, 32, 2, "float32")
    plan = measured.plan(case, targets.parse("h200"), jax.devices()[:1])
    made = plan.compile()
    taken = []

    def executable(state, *batch):
        taken.append(int(state.step))
        return made.executable(state, *batch)

    step, wait = measured.stepper(plan, executable)
    seconds = measured.seconds_of_a_step(step, wait, plan.num_steps)
    assert taken == list(range(measured.WARM_UP + measured.BLOCKS * measured.STEPS))
    assert len(seconds) == measured.BLOCKS and min(seconds) > 0


def test_the_card_is_known_by_its_name():
    assert measured.card_of("NVIDIA H200") == "h200"
    assert measured.card_of("NVIDIA H100 80GB HBM3") == "h100"
    with pytest.raises(InputError, match="cpu is none of"):
        measured.card_of("cpu")


def test_errors_of_two_sizes_are_no_equal_rounding():
    same = {"jax": {"logits": 1e-4}, "torch": {"logits": 1.5e-4}}
    assert card_precision.unequal({"net": {"default": same}}) == []
    other = same | {"torch": {"logits": 1e-7}}
    (line,) = card_precision.unequal({"net": {"default": other}})
    assert line.startswith("net, default, logits")


def test_without_a_gpu_no_stage_runs(tmp_path, monkeypatch, capsys):
    if gpu.Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu")])
    assert gpu.main() == 2 and "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize("flag", ["", "--xla_gpu_no_such_flag=1"], ids=["known", "control"])
def test_xla_knows_the_flags_of_the_stages(flag):
    """XLA ends the process at an unknown flag, as the control shows."""
    flags = " ".join([*gpu.XLA_FLAGS.values(), flag])
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert (done.returncode == 0) == (flag == "")


def test_a_stage_has_its_flags_and_no_other(tmp_path):
    words = ["-c", "import os; print(os.environ.get('XLA_FLAGS'))"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        for name in ("resnet50", "resnet50-without-graphs"):
            assert gpu.run(name, words, tmp_path, 60)
    said = [(tmp_path / f"{n}.log").read_text() for n in ("resnet50", "resnet50-without-graphs")]
    assert said == ["None\n", gpu.XLA_FLAGS["without-graphs"] + "\n"]


PARENT = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "{child}"]).pid, flush=True)
time.sleep({seconds})
"""
SLEEPS = "import time; time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"


@pytest.mark.parametrize("seconds", [0, 60], ids=["parent ended", "parent cut off"])
@pytest.mark.parametrize("child", [SLEEPS, DEAF], ids=["obeys", "deaf"])
def test_a_stage_leaves_no_process(tmp_path, monkeypatch, child, seconds):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    script = PARENT.format(child=child, seconds=seconds)
    with open(tmp_path / "log", "w") as log:
        status = gpu.call([sys.executable, "-c", script], dict(os.environ), log, 3)
    assert status == ("cut off" if seconds else 0)
    time.sleep(0.2)
    assert not is_there(int((tmp_path / "log").read_text()))


def test_a_lent_machine_is_shared_by_the_stages(tmp_path, monkeypatch):
    """A stage that exceeds the time is cut off, and comes last in the next call."""
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0)
    every = {"long": ["-c", SLEEPS], "short": ["-c", "pass"]}
    assert not gpu.run_all(list(every), every, tmp_path, 1 / 60)
    assert not (tmp_path / "short.log").exists()
    assert gpu.in_turn(list(every), tmp_path) == ["short", "long"]
    assert not gpu.run_all(list(every), every, tmp_path, 3 / 60)
    assert (tmp_path / "short.done").exists() and not (tmp_path / "long.done").exists()
    assert gpu.run_all(["short"], {"short": ["-c", "raise SystemExit(1)"]}, tmp_path, 1)


class Machine:
    """Stands in for the timed programs; raises InterruptedError after a number of calls."""

    def __init__(self, monkeypatch, calls=999):
        self.ran, self.calls = [], calls
        monkeypatch.setattr(fresh_process, "execute", self.execute)
        monkeypatch.setattr(end_to_end, "train", self.train)
        monkeypatch.setattr(fresh_process, "absence", lambda framework: None)

    def count(self, job):
        if len(self.ran) == self.calls:
            raise InterruptedError
        self.ran.append((job.framework, job.variant, job.mode))

    def execute(self, job, cache):
        self.count(job)
        assert "-".join(self.ran[-1]) == cache.name
        seconds = {"seconds_per_step": [1.0, len(self.ran)], "compile_seconds": len(self.ran)}
        measured = {"values": [1.0, 2.0], "peak_memory_bytes": 1, "device": {}}
        return measured | seconds | {"flops": 1e9, "bytes": 1e9}

    def train(self, job, course, run_dir, seed, environment):
        self.count(job)
        return {"seconds": [1.0, len(self.ran)], "accuracies": [0.5, 0.95]}


def settings_that_keep(folder, **changes) -> throughput.Settings:
    job = timing.Job(
        arch="resnet20", stem=None, num_classes=10, image_size=8, batch_size=4,
        dtype="float32", device="cpu", blocks=2,
    )  # fmt: skip
    return throughput.Settings(
        job=replace(job, **changes),
        variants={"jax": ("jit",), "torch": ("eager",)},
        modes=("train", "end_to_end"),
        keep=folder,
    )


def test_a_benchmark_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """A benchmark in two parts runs every program once and gives the same rows."""
    whole = Machine(monkeypatch)
    throughput.measure(settings_that_keep(tmp_path / "whole"), lambda _: None)
    settings = settings_that_keep(tmp_path / "parts")
    first = Machine(monkeypatch, calls=5)
    with pytest.raises(InterruptedError):
        throughput.measure(settings, lambda _: None)
    second = Machine(monkeypatch)
    document = throughput.measure(settings, lambda _: None)
    assert first.ran + second.ran == whole.ran and len(first.ran) == 5

    nothing = Machine(monkeypatch, calls=0)
    assert throughput.measure(settings, lambda _: None)["rows"] == document["rows"]
    assert nothing.ran == []


@pytest.mark.control
@pytest.mark.parametrize("changed", ["code", "settings", "folder"])
def test_outcomes_of_other_code_settings_or_folders_are_not_reused(tmp_path, monkeypatch, changed):
    whole = Machine(monkeypatch)
    throughput.measure(settings_that_keep(tmp_path), lambda _: None)
    again = Machine(monkeypatch)
    if changed == "code":
        monkeypatch.setattr(fresh_process, "origin", lambda job: {"code": "another"})
    folder = None if changed == "folder" else tmp_path
    changes = {"steps": 41} if changed == "settings" else {}
    throughput.measure(settings_that_keep(folder, **changes), lambda _: None)
    assert again.ran == whole.ran


@pytest.mark.parametrize("file, same", [("gpu.py", True), ("timed_jax.py", False)])
def test_outcomes_are_of_the_code_that_is_timed(tmp_path, monkeypatch, file, same):
    """A change of `gpu.py`, which only starts the stages, keeps all outcomes."""
    monkeypatch.setattr(fresh_process, "ROOT", tmp_path)
    job = settings_that_keep(tmp_path).job
    before = fresh_process.origin(job)
    (tmp_path / "equivalence_tests" / "benchmark").mkdir(parents=True)
    (tmp_path / "equivalence_tests" / "benchmark" / file).write_text("pass")
    assert (fresh_process.origin(job) == before) == same


def test_an_outcome_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    kept = timing.Kept(tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            kept.outcome({"job": 1}, lambda: {"figure": 1})
    assert kept.outcome({"job": 1}, lambda: {"figure": 2}) == {"figure": 2}
    assert kept.outcome({"job": 1}, lambda: {"figure": 3}) == {"figure": 2}
    assert kept.outcome({"job": 2}, lambda: {"passing": True}) == {"passing": True}
    assert kept.outcome({"job": 2}, lambda: {"figure": 4}) == {"figure": 4}


@pytest.mark.parametrize("number, runs", [(0, 2), (1, 1)])
def test_a_check_that_failed_is_tried_again(tmp_path, monkeypatch, number, runs):
    """A failed timed program is not run again: it may take long, and its row says why."""
    answers = [{"skipped": "failed: no memory"}, {"values": [1.0]}]
    monkeypatch.setattr(fresh_process, "execute", lambda *_: answers.pop(0))
    kept = timing.Kept(tmp_path, {})
    job = settings_that_keep(tmp_path).job
    found = [fresh_process.launch(job, kept, number) for _ in range(2)]
    assert len(answers) == 2 - runs and ("values" in found[1]) == (runs == 2)


@pytest.mark.parametrize("end, kept", [("os.abort()", False), ("raise SystemExit(3)", True)])
def test_a_program_that_was_ended_from_outside_may_run_again(monkeypatch, end, kept):
    original = subprocess.run
    short = [sys.executable, "-c", f"import os; {end}"]
    monkeypatch.setattr(fresh_process.subprocess, "run", lambda _, **how: original(short, **how))
    outcome = fresh_process.execute(settings_that_keep(None).job, Path("cache"))
    assert outcome["skipped"].startswith("failed: status") and ("passing" in outcome) != kept


def test_compiling_is_cold_once_and_then_warm(tmp_path, monkeypatch):
    Machine(monkeypatch)
    rows = throughput.measure(settings_that_keep(tmp_path), lambda _: None)["rows"]
    [row] = [r for r in rows if r["variant"] == "jit" and r["mode"] == "train"]
    assert row["compile_seconds"] < row["compile_seconds_warm_cache"]  # numbered as they ran
    [real] = [r for r in rows if (r["framework"], r["mode"]) == ("jax", "end_to_end")]
    assert (real["seeds"], real["empty_cache"]) == ([1, 2], [True, False])
    caches = {path.name for path in (tmp_path / "caches").iterdir()}
    assert {"jax-jit-train", "torch-eager-train", "jax--end_to_end"} <= caches


def test_the_notes_name_skipped_and_doubtful_variants(monkeypatch):
    names, _ = called("benchmark.py", FLAGS, monkeypatch)
    row = {"framework": "jax", "variant": "jit", "mode": "train", "batch_size": 4}
    row |= {"model_flop_utilisation": 0.5, "roofline_share": 1.01}
    skipped = {"framework": "torch", "variant": "compile", "mode": "train", "reason": "it is off"}
    document = {"rows": [row], "skipped": [skipped], "ratios": {}, "torchvision": {}}
    skip, above = names["notes"](document, "train")
    assert skip == "torch compile: skipped, it is off" and above.startswith("above 100%: jax jit;")
    row["roofline_share"] = 1.0
    assert names["notes"](document, "train") == [skip]
    assert names["notes"](document, "inference") == []
    for ratio, lines in ((0.96, 2), (0.97, 1)):
        document["torchvision"] = {"inference": {"ratio": ratio}}
        found = names["notes"](document, "inference")
        assert len(found) == lines and found[-1].startswith("warning: ") == (lines == 2)
