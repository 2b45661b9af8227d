"""The figures of the benchmark's table, compared with results computed by hand."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import torch_ref
from equivalence_tests.benchmark import (
    agreement,
    fresh_process,
    image_files,
    roofline,
    serving,
    throughput,
    timed_jax,
    timed_torch,
)
from equivalence_tests.benchmark.timing import VARIANTS, Job, Skipped
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.models import create_model

JOB = Job(
    arch="resnet18", stem="imagenet", num_classes=10, image_size=32, batch_size=8,
    dtype="float32", device="cpu",
)  # fmt: skip
JIT = replace(JOB, framework="jax", variant="jit")
MULTI_STEP = replace(JIT, variant="multi_step")
EAGER = replace(JOB, framework="torch", variant="eager")
COMPILE = replace(EAGER, variant="compile")
VALUES = [2.3, 2.2, 2.1]


def ran(job: Job, factor=1.0, rounds=2) -> list[tuple[Job, dict]]:
    """Rounds of a program; the values of the last are multiplied by `factor`."""
    right = {"values": VALUES, "seconds_per_step": [1.0]}
    wrong = right | {"values": [factor * value for value in VALUES]}
    return [(job, right)] * (rounds - 1) + [(job, wrong)]


@pytest.mark.parametrize("dtype", agreement.SAME_LOSS)
def test_a_variant_with_other_losses_is_skipped_with_the_reason(dtype):
    """A variant with a difference below the bound is timed."""
    for share, stays in ((2, False), (0.5, True)):
        factor = 1 + share * agreement.SAME_LOSS[dtype]
        outcomes = [
            ran(replace(job, dtype=dtype), factor if job == COMPILE else 1)
            for job in (JIT, EAGER, MULTI_STEP, COMPILE)
        ]
        *others, last = agreement.check_losses(outcomes)
        assert others == outcomes[:3] and throughput.timed(last) == stays
        if not stays:
            said = throughput.reason(last)
            assert (said["variant"], said["mode"]) == ("compile", "train")
            assert f"{factor - 1:.1e} from those of jax jit" in said["reason"]


@pytest.mark.parametrize("job", [JIT, EAGER])
def test_the_plain_pair_must_agree(job):
    outcomes = [ran(each, 1.01 if each == job else 1) for each in (JIT, EAGER)]
    if job == EAGER:
        with pytest.raises(agreement.Disagreement, match="torch eager.*1.0e-02.*jax jit"):
            agreement.check_losses(outcomes)
    else:  # a program whose own rounds differ is skipped
        jit, eager = agreement.check_losses(outcomes)
        assert not throughput.timed(jit) and throughput.timed(eager)


def test_losses_that_are_no_numbers_do_not_agree():
    with pytest.raises(agreement.Disagreement):
        agreement.check_losses([ran(JIT), ran(EAGER, float("nan"))])


def test_modes_and_batches_are_not_compared_with_each_other():
    other_batch, other_mode = replace(EAGER, batch_size=4), replace(EAGER, mode="inference")
    outcomes = [ran(JIT), ran(other_batch, 2, rounds=1), ran(other_mode, 3, rounds=1)]
    assert agreement.check_losses(outcomes) == outcomes


@pytest.mark.control
@pytest.mark.parametrize("off, agree", [(1e-7, False), (1e-12, True)])
def test_a_rule_without_weight_decay_is_not_timed(monkeypatch, off, agree):
    """Weight decay changes the first losses by 1e-7, which only float64 shows."""

    def launch(job, kept):
        assert (job.dtype, job.device, job.mode, job.blocks) == ("float64", "cpu", "train", 0)
        factor = 1 + off if job.framework == "torch" else 1
        return {"values": [factor * value for value in VALUES]}

    monkeypatch.setattr(fresh_process, "launch", launch)
    settings = throughput.Settings(job=replace(JOB, dtype="bfloat16"), variants={})
    arguments = settings, dict.fromkeys(VARIANTS), None, lambda _: None
    if agree:
        assert agreement.compare_losses(*arguments)["losses_difference_float64"] < 2 * off
    else:
        with pytest.raises(agreement.Disagreement, match="1.0e-07.*nothing was timed"):
            agreement.compare_losses(*arguments)


def row(framework, variant, speed, mode="train") -> dict:
    return {"framework": framework, "variant": variant, "mode": mode, "images_per_second": speed}


def test_ratios_are_of_the_best_and_of_the_plain():
    rows = [row("jax", "jit", 6), row("jax", "multi_step", 8), row("torch", "eager", 2)]
    rows += [row("torch", "compile", 4), row("jax", "jit", 5, "inference")]
    assert throughput.ratios(rows) == {
        "train": {
            "best_jax": "multi_step", "best_torch": "compile",
            "best_to_best": 2.0, "best_to_eager": 4.0,
        }
    }  # fmt: skip


def test_training_on_real_images_is_compared_with_the_best_on_synthetic_ones():
    rows = [row("jax", "jit", 6), row("jax", "multi_step", 8), row("torch", "eager", 20)]
    assert "real_to_synthetic" not in throughput.ratios(rows)
    rows += [row("torch", "eager", 1, "end_to_end"), row("jax", "jit", 4, "end_to_end")]
    assert throughput.ratios(rows)["real_to_synthetic"] == 0.5


LAYER = roofline.Layer(multiplications=1000, inputs=30, outputs=20, weights=50)


def test_the_floor_of_one_layer():
    """2 FLOPs per multiplication, three passes in training; then the longer of both times."""
    assert roofline.step_flops([LAYER], "inference", 8) == 16_000
    assert roofline.step_flops([LAYER, LAYER], "train", 8) == 96_000
    inference_bytes = 8 * (20 + 30) * 2 + 50 * 2
    arithmetic, memory = {"flops": 1e3, "bytes": 1e9}, {"flops": 1e9, "bytes": 1e3}
    assert roofline.floor_seconds([LAYER], "inference", 8, 2, arithmetic) == 16.0
    assert roofline.floor_seconds([LAYER], "inference", 8, 2, memory) == inference_bytes / 1e3


def test_a_row_is_the_median_of_all_blocks():
    def outcome(seconds, empty, compile_seconds, memory):
        return {
            "seconds_per_step": seconds, "empty_cache": empty, "device": {"name": "abacus"},
            "compile_seconds": compile_seconds, "peak_memory_bytes": memory,
        }  # fmt: skip

    whole = replace(EAGER, batch_size=16)  # did not fit in memory, so it is left out
    runs = [(whole, {"out_of_memory": True})]
    runs += [(EAGER, outcome([1.0, 4.0], True, 9.0, 7)), (EAGER, outcome([2.0], False, 3.0, 5))]
    ceilings = {"flops": 96_000.0, "bytes": 1e9}
    found = throughput.summarize(runs, ceilings, [LAYER, LAYER])
    expected = {
        "batch_size": 8, "requested_batch_size": 16, "images_per_second": 4.0,
        "images_per_second_iqr": 3.0, "ms_per_step": 2000.0, "compile_seconds": 9.0,
        "compile_seconds_warm_cache": 3.0, "peak_memory_bytes": 7,
        "model_flop_utilisation": 0.5, "roofline_share": 0.5, "roofline_images_per_second": 8.0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("framework", VARIANTS)
def test_the_process_of_a_job_starts_an_existing_module(monkeypatch, tmp_path, framework):
    commands = []

    def record(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.setattr(fresh_process.subprocess, "run", record)
    fresh_process.execute(replace(JOB, framework=framework), tmp_path)
    [[_, flag, module]] = commands
    assert flag == "-m" and importlib.util.find_spec(module), module


SIDES = {"jax": timed_jax, "torch": timed_torch}
PAIRS = [("jax", "jit"), ("jax", "folded"), ("torch", "eager"), ("torch", "folded")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[list[tuple[Job, dict]]]:
    """Outcomes of inference with BatchNorm and folded."""
    job = replace(JOB, arch="resnet20", stem=None, image_size=8, mode="inference")
    files = throughput.weight_files(job, tmp_path_factory.mktemp("weights"))
    jobs = [
        replace(job, framework=framework, variant=variant, weights=str(files[framework]))
        for framework, variant in PAIRS
    ]
    return [[(job, evaluated(job))] for job in jobs]


def evaluated(job: Job) -> dict:
    """The outcome of a job in this process, without its settings and without torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_jax, "configure", lambda job: None)
        patch.setattr(timed_torch, "configure", lambda job: torch.device("cpu"))
        patch.setattr(torch, "compile", lambda net, **_: net)
        program = SIDES[job.framework].build(job)
        program.step()
        return {"values": program.values(), "seconds_per_step": [1.0]}


def test_folded_networks_compute_the_same(outcomes):
    assert agreement.check_losses(outcomes) == outcomes
    jit, jax_folded, eager, torch_folded = (outcome["values"] for [(_, outcome)] in outcomes)
    assert jit != jax_folded and eager != torch_folded  # rounding shows that the programs differ


@pytest.mark.control
def test_a_wrong_folding_is_not_timed(outcomes, monkeypatch):
    """Negative control: the folded network has other weights."""
    another = lambda model: create_model("resnet20", 10)  # noqa: E731
    monkeypatch.setattr(timed_jax, "fold_batchnorm", another)
    monkeypatch.setattr(timed_torch, "fuse", lambda net: torch.nn.Sequential(net, torch.nn.ReLU()))
    again = [
        [(job, evaluated(job) if job.variant == "folded" else outcome)]
        for [(job, outcome)] in outcomes
    ]
    checked = [throughput.timed(runs) for runs in agreement.check_losses(again)]
    assert checked == [True, False, True, False]


@pytest.mark.parametrize("side", SIDES)
def test_nothing_is_folded_in_training(side):
    with pytest.raises(Skipped, match="inference"):
        SIDES[side].configure(replace(JOB, framework=side, variant="folded"))


def test_the_speed_on_image_files_leaves_out_the_start(insects, folder, monkeypatch):
    """24 images take 5 s and the first batch of 16 takes 3 s: 8 images take 2 s."""
    written = {}
    monkeypatch.setattr(image_files.results, "write", lambda name, values: written.update(values))
    monkeypatch.setattr(
        image_files, "of_process", lambda run, *images: 5 if len(images) == 1 else 3
    )
    run = load_run(insects)
    small = replace(run, config=replace(run.config, eval_batch_size=16))
    monkeypatch.setattr(image_files, "load_run", lambda path: small)
    monkeypatch.setattr(sys, "argv", ["image_files", str(insects), str(folder / "test")])
    image_files.main()
    assert written["files"] == 24 and len(written["rounds"]) == image_files.ROUNDS
    speeds = written["images_per_second"]
    assert speeds["command"] == 4 and min(speeds["decoding"], speeds["network"]) > 0


def test_measured_processes_start_as_those_of_users(monkeypatch, tmp_path):
    """Without kept bytecode, importing JAX or PyTorch takes seconds more."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in fresh_process.environment(JIT, tmp_path)
    passed = []
    monkeypatch.setattr(
        serving.subprocess,
        "run",
        lambda *_, env, **__: passed.append(env) or SimpleNamespace(stdout=b"{}"),
    )
    assert serving.in_process(tmp_path, "JAX", 1) == {}
    assert "PYTHONDONTWRITEBYTECODE" not in passed[0]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_int8_of_pytorch_is_close_to_float32(tmp_path):
    """Its file holds the ranges of the calibration, not those of the images with which it loads."""
    torch_int8 = pytest.importorskip("equivalence_tests.benchmark.torch_int8")
    torch.manual_seed(0)
    net = torch_ref.create_model("resnet20", num_classes=10).eval()
    images = torch.randn(32, 3, 32, 32)
    small = torch_int8.quantized(net, images.split(8))
    torch.save(small.state_dict(), tmp_path / "int8.pth")
    loaded = torch_int8.load(tmp_path / "int8.pth", net, torch.zeros(1, 3, 32, 32))
    with torch.inference_mode():
        exact, found, again = net(images), small(images), loaded(images)
    # A step of 1/127 of the largest value a layer; an unscaled or shuffled output is off by 1.
    assert 0 < (found - exact).norm() / exact.norm() < 0.1
    assert torch.equal(again, found)
