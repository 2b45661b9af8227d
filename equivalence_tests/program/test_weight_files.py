"""Weight files are read completely or refused, whatever their names and formats."""

import collections
import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import flax_resnet
import torch_ref
from equivalence_tests.parity import inputs
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.weight_files import same, saved
from equivalence_tests.studies import weight_flips
from flax_resnet.errors import InputError
from flax_resnet.weights import files, torch_file
from torch_ref import checkpoint


@pytest.fixture(scope="module")
def arrays() -> dict:
    return inputs.make_case("resnet20").arrays


@pytest.fixture(scope="module")
def tensors(arrays) -> dict:
    return checkpoint.to_tensors(arrays)


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
    weight_flips.save_legacy(tmp_path / "a.th", arrays)
    digest = hashlib.sha256((tmp_path / "a.th").read_bytes()).hexdigest()
    path = (tmp_path / "a.th").rename(tmp_path / f"a-{digest}.th")
    assert files.load(path)[1] == "a-" + digest + ".th: its SHA-256 is that of its name"
    path = path.rename(tmp_path / "a-20240131.th")  # a date
    assert files.load(path)[1] == ""


@pytest.mark.parametrize("kind", weight_flips.KINDS)
def test_a_file_that_its_name_contradicts_is_refused(kind, arrays, tmp_path):
    """One flipped bit of a published file, which its format would not notice."""
    weight_flips.KINDS[kind](tmp_path / "net", arrays)
    path = (tmp_path / "net").rename(tmp_path / "net-0123abcd.th")
    readers = [files.load, flax_resnet.pretrained]
    for read in readers + [checkpoint.load] * (kind != ".safetensors"):
        with pytest.raises(InputError, match="net-0123abcd.th: damaged or changed.*a name without"):
            read(path)
    outcome = run_script("convert.py", path, tmp_path / "out.safetensors")
    refused(outcome, "net-0123abcd.th", "SHA-256", "a name without 0123abcd")
    assert same(files.load(path.rename(tmp_path / "net.th"))[0], arrays)


def test_no_file_is_written_under_a_name_that_promises_another(arrays, tmp_path):
    weight_flips.save_legacy(tmp_path / "a.th", arrays)
    outcome = run_script("convert.py", tmp_path / "a.th", tmp_path / "b-0123abcd.safetensors")
    refused(outcome, "b-0123abcd.safetensors", "0123abcd", "another name")
    assert [path.name for path in tmp_path.iterdir()] == ["a.th"]


def test_reading_weights_does_not_import_torch(tensors, arrays, tmp_path, monkeypatch):
    path = saved(tmp_path, collections.OrderedDict(tensors))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert same(files.load(path)[0], arrays)
