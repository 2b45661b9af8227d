"""The weights in a file: which are taken, what they become, which numbers are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flax_resnet
from equivalence_tests.parity import inputs
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.weight_files import same, saved
from flax_resnet.config import ModelConfig, TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.interop import loaded_run
from flax_resnet.training import fit
from flax_resnet.weights import convert, files
from torch_ref import checkpoint

LOOKS = ["--image-size", 32, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 1]


@pytest.fixture(scope="module")
def arrays() -> dict:
    return inputs.make_case("resnet20").arrays


@pytest.fixture(scope="module")
def tensors(arrays) -> dict:
    return checkpoint.to_tensors(arrays)


def other(tensors: dict) -> dict:
    """Weights of the same network, with every number different."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def prefixed(tensors: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def headless(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


# Choice of tensors in a file.

FORMS = {
    "alone": (lambda w: w, ""),
    "net": (lambda w: {"net": w, "acc": 93.1, "epoch": 3}, "under 'net'"),
    "model_state": (lambda w: {"model_state": w}, "under 'model_state'"),
    "deep": (lambda w: {"a": {"b": [{"weights": w}]}}, "under 'a/b/0/weights'"),
    "a pair": (lambda w: (w, {"lr": 0.1}), "under '0'"),
    "Lightning": (
        lambda w: {"state_dict": prefixed(w, "model.") | {"criterion.weight": torch.ones(7)}},
        "under 'state_dict'; prefix 'model.' dropped; left out: criterion.weight",
    ),
    "an average": (
        lambda w: {"n_averaged": torch.tensor(3)} | prefixed(w, "module."),
        "prefix 'module.' dropped; left out: n_averaged",
    ),
    "any prefix": (lambda w: prefixed(w, "my.own_net."), "prefix 'my.own_net.' dropped"),
    "beside its average": (
        lambda w: {"state_dict": w, "state_dict_ema": other(w)},
        "under 'state_dict'; averaged weights are under state_dict_ema: `ema` takes them",
    ),
    "beside its average in one mapping": (
        lambda w: prefixed(w, "model.") | prefixed(other(w), "model_ema.module."),
        "prefix 'model.' dropped; averaged weights are under model_ema.module: `ema` takes them",
    ),
    "beside the optimizer": (
        lambda w: {"state_dict": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        "under 'state_dict'; left out: optimizer",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_are_found_and_what_was_taken_is_said(form, arrays, tensors, tmp_path):
    wrap, said = FORMS[form]
    path = saved(tmp_path, wrap(tensors))
    got, line = files.load(path)
    assert same(got, arrays)
    assert line == (f"weights.pth: {said}" if said else "")


def test_the_average_is_taken_where_it_is_asked_for(tensors, tmp_path):
    path = saved(tmp_path, {"model": tensors, "model_ema": other(tensors)})
    assert same(files.load(path, ema=True)[0], other(tensors))
    assert same(files.load(path, "model_ema")[0], other(tensors))
    assert same(files.load(path, "model")[0], tensors)
    path = saved(tmp_path, {"model": tensors})
    with pytest.raises(InputError, match="`ema`: no averaged weights; there are model"):
        files.load(path, ema=True)


def test_of_several_networks_none_is_guessed(tensors, tmp_path):
    path = saved(tmp_path, {"student": {"net": tensors}, "critic": other(tensors)})
    with pytest.raises(InputError, match="several networks: student.net, critic; .*`weights_key`"):
        files.load(path)
    for key in ("critic", "student", "student.net", "student/net", "net"):
        expected = other(tensors) if key == "critic" else tensors
        assert same(files.load(path, key)[0], expected)
    with pytest.raises(InputError, match="no network under 'x'; there are student.net, critic"):
        files.load(path, "x")


def test_what_was_taken_is_printed_by_the_command(tensors, arrays, tmp_path):
    path = saved(tmp_path, {"net": tensors, "net_ema": other(tensors)})
    for flags, expected in (([], arrays), (["--ema"], {n: a + 1 for n, a in arrays.items()})):
        out = tmp_path / "out.pth.tar"
        outcome = run_script("convert.py", path, out, "--overwrite", *flags)
        assert outcome.status == 0, outcome.err
        assert outcome.out.startswith("weights.pth: under 'net")
        assert same(files.load(out)[0], expected)
    refused(run_script("convert.py", path, tmp_path / "no.pth", "--weights-key", "x"), "'x'", "net")


def test_a_backbone_becomes_a_run_with_a_new_head(tensors, arrays, tmp_path):
    content = prefixed(headless(tensors), "module.backbone.") | {"head.weight": torch.ones(3, 9)}
    path = saved(tmp_path, {"state_dict": content})
    outcome = run_script("convert.py", path, tmp_path / "run", "--class-names", "a,b,c", *LOOKS)
    assert outcome.status == 0, outcome.err
    assert "its head new and untrained" in outcome.out and "left out: head.weight" in outcome.out
    run = loaded_run.load_run(tmp_path / "run")
    got = convert.state_dict(run.network.to_model(run.variables))
    assert got["fc.weight"].shape == (3, 64) and run.config.model.num_classes == 3
    assert same(headless(got), headless(arrays))
    refused(run_script("convert.py", path, tmp_path / "out.pth"), "has no head (fc)")


def fine_tuned(source: Path, num_classes=3, class_names=(), **options) -> tuple[dict, list]:
    """The initial weights of a training that starts from a file, and its messages."""
    model, said = flax_resnet.create_model("resnet20", num_classes), []
    config = TrainConfig(
        init_from=str(source), model=ModelConfig(num_classes=num_classes), **options
    )
    fit._fine_tune(model, config, class_names, said.append)
    return flax_resnet.state_dict(model), said


def test_fine_tuning_starts_from_any_file(tensors, arrays, tmp_path):
    new_head = "the head is new: 3 classes"
    path = saved(tmp_path, tensors)  # of 7 classes
    got, said = fine_tuned(path)
    assert same(headless(got), headless(arrays)) and said == [new_head]
    got, said = fine_tuned(path, num_classes=7)
    assert same(got, arrays) and said == []
    got, said = fine_tuned(saved(tmp_path, {"net": headless(tensors)}))
    assert same(headless(got), headless(arrays)) and said == ["weights.pth: under 'net'", new_head]
    contrastive = prefixed(tensors, "encoder_q.") | prefixed(other(tensors), "encoder_k.")
    path = saved(tmp_path, contrastive | {"encoder_q.fc.2.weight": torch.ones(3, 3)})
    got, said = fine_tuned(path, num_classes=7)
    assert same(headless(got), headless(arrays)) and said[1:] == ["the head is new: 7 classes"]
    got, _ = fine_tuned(path, ema=True)
    assert same(headless(got), headless(other(tensors)))
    got, _ = fine_tuned(path, weights_key="encoder_k")
    assert same(headless(got), headless(other(tensors)))


@pytest.fixture(scope="module")
def runs(arrays, tmp_path_factory) -> dict[str, Path]:
    """Runs of one network with its classes in two orders, and of one whose numbers overflow."""
    folder = tmp_path_factory.mktemp("runs")
    turned = {name: arrays[name][::-1] for name in ("fc.weight", "fc.bias")}
    huge = {"fc.weight": np.full_like(arrays["fc.weight"], 3e38)}
    kinds = {"plain": ({}, "abcdefg"), "turned": (turned, "gfedcba"), "huge": (huge, "abcdefg")}
    for kind, (changed, letters) in kinds.items():
        checkpoint.save(folder / f"{kind}.pth", arrays | changed)
        flags = ["--class-names", ",".join(letters), *LOOKS]
        outcome = run_script("convert.py", folder / f"{kind}.pth", folder / kind, *flags)
        assert outcome.status == 0, outcome.err
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    for split in ("train", "val", "test"):
        for letter, image in zip("abcdefg", pixels, strict=True):
            (folder / "set" / split / letter).mkdir(parents=True)
            Image.fromarray(image).save(folder / "set" / split / letter / "0.png")
    return {kind: folder / kind for kind in (*kinds, "set")}


def test_classes_are_matched_by_name(runs, arrays, tmp_path):
    figures = []
    for kind in ("plain", "turned"):
        flags = ["--dataset", f"folder:{runs['set']}", "--json", tmp_path / f"{kind}.json"]
        outcome = run_script("evaluate.py", runs[kind], *flags)
        assert outcome.status == 0, outcome.err
        figures.append(json.loads((tmp_path / f"{kind}.json").read_text()))
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"])
    assert figures[0]["accuracy"] == figures[1]["accuracy"]
    got, said = fine_tuned(runs["turned"], 7, class_names="abcdefg")
    assert same(got, arrays) and "another order, matched by name" in said[0]
    got, said = fine_tuned(runs["turned"], 7, class_names="tuvwxyz")
    assert np.array_equal(got["fc.bias"], arrays["fc.bias"][::-1]) and said == []


def test_what_is_no_number_is_not_written(runs, tmp_path):
    out = tmp_path / "out.json"
    predicted = run_script("predict.py", runs["huge"], runs["set"] / "test", "--json", out)
    evaluated = run_script(
        "evaluate.py", runs["huge"], "--dataset", f"folder:{runs['set']}", "--json", out
    )
    for outcome, words in ((predicted, "no finite probabilities"), (evaluated, "the loss is")):
        assert outcome.status == 1 and words in outcome.err and outcome.err.count("\n") == 1
    assert not out.exists()


def test_flags_of_weights_need_weights():
    for flag in ({"ema": True}, {"weights_key": "net"}):
        with pytest.raises(ValueError, match="needs `init_from`"):
            TrainConfig(**flag)


# Allowed values.


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.int32])
def test_counts_are_int64_whatever_they_were(kind, tensors, arrays, tmp_path):
    changed = {n: t.to(kind) if "num_batches" in n else t for n, t in tensors.items()}
    path = saved(tmp_path, changed)
    written = []
    for source in (saved(tmp_path, tensors, "plain.pth"), path):
        outcome = run_script("convert.py", source, tmp_path / "out.safetensors", "--overwrite")
        assert outcome.status == 0, outcome.err
        written.append((tmp_path / "out.safetensors").read_bytes())
    assert written[0] == written[1]


IMPOSSIBLE = {
    "a negative variance": ("bn1.running_var", lambda a: a * -1, "has negative values"),
    "half a batch": ("bn1.num_batches_tracked", lambda a: np.float32(0.5), "no count"),
    "a negative count": ("bn1.num_batches_tracked", lambda a: np.int64(-1), "no count"),
    "a count beyond int32": ("bn1.num_batches_tracked", lambda a: np.int64(2**40), "too large for"),
    "a count beyond int64": ("bn1.num_batches_tracked", lambda a: np.float32(1e30), "no count"),
    "an infinite count": ("bn1.num_batches_tracked", lambda a: np.float16(np.inf), "non-finite"),
    "beyond float32": ("conv1.weight", lambda a: a.astype("f8") * 1e60, "too large for float32"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_impossible_numbers_are_refused_and_nothing_is_loaded(kind, arrays):
    name, change, words = IMPOSSIBLE[kind]
    model = flax_resnet.create_model("resnet20", 7)
    before = flax_resnet.state_dict(model)
    with pytest.raises(InputError, match=words) as error:
        flax_resnet.load_state_dict(model, arrays | {name: change(arrays[name])})
    assert name in str(error.value) and same(flax_resnet.state_dict(model), before)


NO_ARRAYS = {
    "nothing": (lambda arrays: None, "got NoneType"),
    "a list": (lambda arrays: list(arrays.items()), "got list"),
    "a path": (lambda arrays: "weights.pth", "got str"),
    "a number as name": (lambda arrays: arrays | {3: 0}, "names of weights are text, got 3"),
    "no array": (lambda arrays: arrays | {"fc.bias": None}, "fc.bias has shape ()"),
    "rows of two lengths": (
        lambda arrays: arrays | {"fc.bias": [[1], [2, 3]]},
        "fc.bias is a list",
    ),
    "bfloat16": (
        lambda arrays: arrays | {"fc.bias": torch.zeros(7).bfloat16()},
        "fc.bias is a Tensor that NumPy does not take; for a tensor give tensor.detach()",
    ),
    "a parameter": (
        lambda arrays: arrays | {"fc.bias": nn.Parameter(torch.zeros(7))},
        "fc.bias is a Parameter that NumPy does not take",
    ),
}


@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_are_no_arrays_are_refused_and_nothing_is_loaded(kind, arrays):
    change, words = NO_ARRAYS[kind]
    model = flax_resnet.create_model("resnet20", 7)
    before = flax_resnet.state_dict(model)
    with pytest.raises(InputError, match=re.escape(words)):
        flax_resnet.load_state_dict(model, change(arrays))
    assert same(flax_resnet.state_dict(model), before)
