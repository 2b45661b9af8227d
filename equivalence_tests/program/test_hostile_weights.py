"""Weight files with code, traps and impossible sizes are refused at once."""

import argparse
import pickle
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from equivalence_tests.parity import inputs
from equivalence_tests.program.weight_files import same, saved
from flax_resnet.errors import InputError
from flax_resnet.weights import convert, files, names, torch_file


class Net(nn.Linear):
    pass


FOREIGN = {
    "a namespace": (lambda w: {"state_dict": w, "args": argparse.Namespace(lr=1)}, "Namespace"),
    "a number of NumPy": (lambda w: {"state_dict": w, "best": np.float64(1)}, "numpy.float64"),
    "an array": (lambda w: {"fc.bias": np.ones(3)}, "numpy.ndarray"),
    "a module": (lambda w: Net(2, 3), "test_hostile_weights.Net"),
    "code": (lambda w: {"fc.bias": Code()}, ".print"),
    "eight bits": (lambda w: {"fc.bias": torch.ones(3).to(torch.float8_e5m2)}, "torch."),
    "negated when it is read": (lambda w: {"fc.bias": torch._neg_view(torch.ones(3))}, "computed"),
    "sparse": (lambda w: {"fc.weight": torch.eye(3).to_sparse()}, "torch."),
}


class Code:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_neither_tensor_nor_plain_is_named(kind, legacy, tmp_path, capsys):
    content, name = FOREIGN[kind]
    path = saved(
        tmp_path, content({"fc.bias": torch.zeros(3)}), _use_new_zipfile_serialization=not legacy
    )
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


def doubled(levels: int = 28) -> bytes:
    """The opcodes of a tuple of the previous one twice, and so on: 2^levels parts."""
    return b")" + b"2\x86" * levels


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\n%sX\3\0\0\0cpuK\1tQ"

TRAPS = {
    "a key": b"\x80\2}" + doubled() + b"}s.",
    "one of several keys": b"\x80\2}(K\1}" + doubled() + b"}u.",
    "a key of a dict made at once": b"\x80\2(" + doubled() + b"}d.",
    "a key of an OrderedDict": b"\x80\2ccollections\nOrderedDict\n]](" + doubled() + b"K\1ea\x85R.",
    "the name of a storage": b"\x80\2" + STORAGE % doubled() + b".",
    "an item of a set": b"\x80\4\x8f(" + doubled() + b"\x90.",
    "an item of a frozen set": b"\x80\4(" + doubled() + b"\x91.",
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


def test_an_old_file_of_another_protocol_is_refused_at_once(tmp_path):
    start, started = torch_file.LEGACY_START, time.monotonic()
    (tmp_path / "a.pth").write_bytes(start + b"\x80\2" + doubled() + b"." + b"\x80\2}.")
    with pytest.raises(InputError, match="damaged: its protocol is not 1001"):
        files.load(tmp_path / "a.pth")
    assert time.monotonic() - started < 5


def test_keys_of_plain_tuples_are_read(tmp_path):
    content = {"fc.bias": torch.zeros(3), (1, "a"): 3, "sets": [{1, 2}, frozenset("ab")]}
    assert list(files.read(saved(tmp_path, content, pickle_protocol=4))[0]) == ["fc.bias"]
    python_2 = b"\x80\2ccollections\nOrderedDict\n]](X\7\0\0\0fc.biasctorch._utils\n"
    tensor = (
        b"_rebuild_tensor_v2\n(" + STORAGE % b"X\1\0\0\x000" + b"K\0K\1\x85K\1\x85\x89NtRea\x85R."
    )
    path = forged(tmp_path / "b.pth", python_2 + tensor)
    assert same(files.load(path)[0], {"fc.bias": np.zeros(1)})


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


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    """The file is sparse and takes no space."""
    size = 2**40
    with (path := tmp_path / "net.safetensors").open("wb") as file:
        file.write(size.to_bytes(8, "little") + b"{")
        file.truncate(8 + size)
    with pytest.raises(InputError, match="its table of contents takes 1,099,511,627,776 bytes"):
        files.load(path)


def test_networks_whose_names_collapse_are_refused(tmp_path):
    torch.save({1: {"w": torch.zeros(1)}, "1": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="two entries are called '1/w'"):
        files.load(tmp_path / "a.pth")


def one_tensor_of_many_names(key: str, number: int) -> dict:
    """A content that is small in a file, where the key and the tensor stand once."""
    return {key: dict.fromkeys(map(str, range(number)), torch.zeros(1))}


def test_names_that_grow_out_of_a_small_file_are_refused(tmp_path):
    path = saved(tmp_path, one_tensor_of_many_names("k" * 100_000, 300))
    with pytest.raises(InputError, match=r"a name of more than 1,000 characters: k{50,}\.\.\.$"):
        files.read(path)
    path = saved(tmp_path, one_tensor_of_many_names("k", torch_file.MOST_TENSORS + 1))
    with pytest.raises(InputError, match="more than 100,000 entries"):
        files.read(path)


def test_a_long_key_without_tensors_is_read(tmp_path):
    path = saved(tmp_path, {"fc.bias": torch.zeros(3), "k" * 100_000: "text"})
    assert list(files.read(path)[0]) == ["fc.bias"]


def test_many_networks_are_told_apart_at_once():
    averages = {f"ema.{i}.layer1.0.conv1.weight": None for i in range(20_000)}
    more = {"model.fc.bias": 1, "model.layer1.0.conv1.weight": 2, "epoch": 3}
    started = time.monotonic()
    choice = names.choose(averages | more)
    assert time.monotonic() - started < 5
    assert choice.arrays == {"fc.bias": 1, "layer1.0.conv1.weight": 2}
    assert choice.left_out == ["epoch"] and len(choice.averaged) == 20_000


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
