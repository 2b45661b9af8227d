"""Weight files are read completely or refused, whatever their names and nesting."""

import argparse
import collections
import hashlib
import json
import pickle
import re
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

import flax_resnet
import torch_ref
from equivalence_tests.parity import inputs
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.studies import weight_flips
from flax_resnet.config import ModelConfig, TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.interop import loaded_run
from flax_resnet.training import fit
from flax_resnet.weights import convert, files, names, torch_file
from torch_ref import checkpoint

LOOKS = ["--image-size", 32, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 1]


@pytest.fixture(autouse=True)
def no_x64():
    yield
    jax.config.update("jax_enable_x64", False)


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


def saved(folder: Path, content, name="weights.pth", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def same(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(
        np.array_equal(got[name], np.asarray(expected[name])) for name in expected
    )


# File formats.


@pytest.mark.parametrize("name", ["a.pth", "a.PTH", "a.pth.tar", "a.ckpt", "a.bin", "a", "a.sft"])
def test_the_content_of_a_file_says_what_it_is(arrays, tensors, tmp_path, name):
    new, legacy, safe = (tmp_path / f"{kind}-{name}" for kind in ("new", "legacy", "safe"))
    torch.save(tensors, new)
    weight_flips.save_legacy(legacy, arrays)
    save_file(arrays, safe)
    for path in (new, legacy, safe):
        assert same(files.load(path)[0], arrays)


def test_a_file_of_training_is_read_as_torch_reads_it(tmp_path):
    net = torch_ref.create_model("resnet20", 7)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4]).state_dict(),
        "random": torch.get_rng_state(),
        "parameter": net.conv1.weight,
        "transposed": torch.randn(3, 5).T,
        "part": torch.arange(20).view(4, 5)[1:, ::2],
        "narrow": [torch.randn(3).bfloat16(), torch.randn(3).half(), torch.ones(0, 3)],
        "plain": [torch.Size([3]), torch.device("cpu"), torch.float32, b"bytes", {1, 2}, None],
        "net": net.state_dict(),
    }
    for legacy in (False, True):
        path = saved(tmp_path, content, _use_new_zipfile_serialization=not legacy)
        got = torch_file.read(path)
        assert len([name for name in got if name.startswith("optimizer/state/")]) == 3 * 59
        assert same(files.load(path)[0], net.state_dict())
        for name in ("random", "parameter", "transposed", "part"):
            assert np.array_equal(got[name], content[name].detach().numpy())
        for number, tensor in enumerate(content["narrow"]):
            assert np.array_equal(got[f"narrow/{number}"].astype("f4"), tensor.float().numpy())


NO_WEIGHTS = {
    "empty": (b"", "empty"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "a page": (b"<!DOCTYPE html><title>Not found</title>", "neither a file of torch.save nor"),
    "a pickle": (pickle.dumps({"fc.bias": 1}), "a pickle, but not of torch.save"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "Keras"),
    "a header of safetensors alone": (b"\x08\0\0\0\0\0\0\0{}", "truncated"),
    "a header that promises": (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "truncated"),
    "a nested header": (b"\xa0\x86\x01\0\0\0\0\0" + b'{"a":' * 20_000, ".safetensors"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_files_of_another_kind_are_named(kind, tmp_path):
    content, words = NO_WEIGHTS[kind]
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match="weights.pth: ") as error:
        files.load(tmp_path / "weights.pth")
    assert words in str(error.value)


def test_what_is_no_file_is_not_read():
    for place in ("/dev/zero", "/dev/null"):
        with pytest.raises(InputError, match=f"{place} is no regular file"):
            files.load(Path(place))


@pytest.mark.parametrize("kind", weight_flips.KINDS)
def test_a_file_that_is_cut_off_is_called_truncated(kind, arrays, tmp_path):
    weight_flips.KINDS[kind](tmp_path / "whole", arrays)
    whole = (tmp_path / "whole").read_bytes()
    for length in (200, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated"):
            files.load(tmp_path / "cut")


def test_no_flipped_bit_of_a_pth_gives_other_weights():
    """The file has few numbers, so many bits belong to names, sizes and the zip itself."""
    few = {"layer1.0.conv1.weight": np.ones((2, 1, 1, 1), "f4"), "fc.bias": np.arange(9.0)}
    found = weight_flips.count(".pth", few, 400, lambda path: files.load(path)[0])
    assert found["other weights"] == 0 and found["refused"] > 200
    network = weight_flips.count(".pth", weight_flips.network(), 30)
    assert network["other weights"] == 0 and network["refused"] > 25


def test_flipped_bits_in_formats_without_checksums_never_end_in_another_error():
    few = {"layer1.0.conv1.weight": np.ones((2, 1, 1, 1), "f4"), "fc.bias": np.arange(9.0)}
    for kind in (".pth before PyTorch 1.6", ".safetensors"):
        found = weight_flips.count(kind, few, 300, lambda path: files.load(path)[0])
        assert found["refused"] > 50


@pytest.mark.parametrize("legacy", [False, True])
def test_a_single_tensor_is_no_network(legacy, tmp_path):
    path = saved(tmp_path, torch.zeros(3), _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="a single tensor without a name"):
        files.load(path)


def test_a_checksum_in_the_name_is_held_against_the_file(arrays, tmp_path):
    weight_flips.save_legacy(tmp_path / "a-0123abcd.th", arrays)
    assert "DAMAGED OR RENAMED" in files.load(tmp_path / "a-0123abcd.th")[1]
    content = (tmp_path / "a-0123abcd.th").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    path = (tmp_path / "a-0123abcd.th").rename(tmp_path / f"a-{digest}.th")
    assert files.load(path)[1] == "a-" + digest + ".th: its SHA-256 is that of its name"
    path = path.rename(tmp_path / "a-20240131.th")  # a date
    assert files.load(path)[1] == ""


# Malicious and broken contents.


class Net(nn.Linear):
    pass


FOREIGN = {
    "a namespace": (lambda w: {"state_dict": w, "args": argparse.Namespace(lr=1)}, "Namespace"),
    "a number of NumPy": (lambda w: {"state_dict": w, "best": np.float64(1)}, "numpy.float64"),
    "an array": (lambda w: {"fc.bias": np.ones(3)}, "numpy.ndarray"),
    "a module": (lambda w: Net(2, 3), "test_weights.Net"),
    "code": (lambda w: {"fc.bias": Code()}, ".print"),
    "eight bits": (lambda w: {"fc.bias": torch.ones(3).to(torch.float8_e5m2)}, "torch."),
    "sparse": (lambda w: {"fc.weight": torch.eye(3).to_sparse()}, "torch."),
}


class Code:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_neither_tensor_nor_plain_is_named(kind, legacy, tensors, tmp_path, capsys):
    content, name = FOREIGN[kind]
    path = saved(tmp_path, content(tensors), _use_new_zipfile_serialization=not legacy)
    capsys.readouterr()
    with pytest.raises(InputError) as error:
        files.load(path)
    message = str(error.value)
    assert name in message and "torch.save(model.state_dict(), FILE)" in message
    assert message.isprintable() and capsys.readouterr().out == ""


def forged(path: Path, pickled: bytes) -> Path:
    """A zip in torch.save's format with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(4))
    return path


def test_torchscript_is_named(tmp_path):
    path = forged(tmp_path / "a.pt", b"\x80\2}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\2).")
        archive.writestr("archive/code/net.py", "class Net: pass", zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"a TorchScript program.*torch.jit.load\(FILE\)"):
        files.load(path)


def deep(levels: int) -> bytes:
    return b"\x80\x02" + b"}X\x01\0\0\0a" * levels + b"}" + b"s" * levels + b"."


def shared(levels: int) -> bytes:
    """Nested lists in which each holds the previous one twice: 2^levels paths."""
    content = []
    for _ in range(levels):
        content = [content, content]
    return pickle.dumps(content, 2)


TRAPS = {
    "deep": deep(100_000),
    "shared": shared(200),
    "a memo of gigabytes": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a text of gigabytes": b"\x80\x04\x8d\0\0\0\0\xff\0\0\0.",
    "bytes of gigabytes": b"\x80\x05\x96\0\0\0\0\xff\x7f\0\0.",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_malicious_pickles_are_refused_at_once(trap, tmp_path):
    path, started = forged(tmp_path / "trap.pth", TRAPS[trap]), time.monotonic()
    with pytest.raises(InputError, match="trap.pth: "):
        files.load(path)
    assert time.monotonic() - started < 5


def tensor_of_one_number(offset: int, size: int, stride: int) -> bytes:
    """The pickle of {"fc.bias": a view of a storage of one float}."""
    offset, size, stride = (
        b"J" + n.to_bytes(4, "little", signed=True) for n in (offset, size, stride)
    )
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1tQ"
    rest = storage + offset + size + b"\x85" + stride + b"\x85" + b"\x89NtRs."
    return b"\x80\2}X\7\0\0\0fc.biasctorch._utils\n_rebuild_tensor_v2\n(" + rest


def test_tensors_that_reach_out_of_their_storage_are_refused(tmp_path):
    path = forged(tmp_path / "a.pth", tensor_of_one_number(0, 1, 1))
    assert same(files.load(path)[0], {"fc.bias": np.zeros(1)})
    for numbers in ((0, 2, 1), (1, 1, 1), (-1, 1, 1), (0, 2, -1), (0, -1, 1)):
        with pytest.raises(InputError, match="damaged: a tensor"):
            files.load(forged(path, tensor_of_one_number(*numbers)))


def test_networks_whose_names_collapse_are_refused(tmp_path):
    torch.save({1: {"w": torch.zeros(1)}, "1": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="two entries are called '1/w'"):
        files.load(tmp_path / "a.pth")


STRANGE = {
    "a stage of millions": ["layer999999999.99999999999999.conv1.weight"],
    "a block of millions": ["layer1.99999999999999.conv1.weight"],
    "a stage of Hugging Face": [f"encoder.stages.{'9' * 6000}.layers.0.layer.0.convolution.weight"],
    "a name of megabytes": ["layer1." + "a." * 2_000_000 + "weight"],
    "many names": [f"layer1.0.x\x1b[31m\u202e{i}" for i in range(9_000)],
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_names_are_answered_at_once_in_a_short_line(kind):
    strange = {name: np.ones(1, np.float32) for name in STRANGE[kind]}
    shapes, started = inputs.state_shapes("basic_cnn"), time.monotonic()
    with pytest.raises(InputError) as error:
        convert.conform(strange, shapes)
    message = str(error.value)
    assert len(message) < 2_000 and message.isprintable() and "nearest architecture" in message
    assert time.monotonic() - started < 10


def test_more_entries_than_any_network_has_are_refused():
    with pytest.raises(InputError, match="1,000,000 entries"):
        names.choose(dict.fromkeys(map(str, range(10**6))))


@pytest.mark.parametrize("shape", [(10**12, 0), (0, 10**12), (10**9, 0, 3, 3)])
def test_huge_shapes_are_only_compared(shape):
    strange = {name: np.ones(shape) for name in ("fc.weight", "conv1.weight")}
    with pytest.raises(InputError, match="nearest architecture"):
        convert.conform(strange, inputs.state_shapes("basic_cnn"))


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


def test_reading_weights_does_not_import_torch(tensors, arrays, tmp_path, monkeypatch):
    path = saved(tmp_path, collections.OrderedDict(tensors))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert same(files.load(path)[0], arrays)
