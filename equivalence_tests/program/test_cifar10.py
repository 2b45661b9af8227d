"""CIFAR-10 as published: archives, folders of batches, and broken or malicious files."""

import hashlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.image_folder import refused
from flax_resnet.config import DataConfig
from flax_resnet.data import cifar10
from flax_resnet.data.sources import open_dataset

PLANES = np.random.default_rng(0).integers(0, 256, (6, 40, 3, 32, 32), np.uint8)
LABELS = [np.random.default_rng(n).permutation(np.arange(40) % 10).tolist() for n in range(6)]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_files(kind):
    pairs = list(zip(PLANES, LABELS, strict=True))
    if kind == "bin":
        rows = [np.c_[np.array(y, np.uint8), x.reshape(40, -1)] for x, y in pairs]
        files = {f"{name}.bin": row.tobytes() for name, row in zip(BATCHES, rows, strict=True)}
        return files | {"batches.meta.txt": "\n".join(cifar10.CLASS_NAMES).encode() + b"\n\n"}
    protocol = {"py2": 2, "py": 4, "py5": 5}[kind]
    content = [
        {b"data": x.reshape(40, -1), b"labels": y, b"batch_label": b"b", b"filenames": [b"f"] * 40}
        for x, y in pairs
    ]
    dumps = [pickle.dumps(values, protocol) for values in content]
    if kind == "py2":  # as Python 2 with NumPy 1 wrote them
        dumps = [
            dump.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") for dump in dumps
        ]
    meta = {b"label_names": [name.encode() for name in cifar10.CLASS_NAMES]}
    return dict(zip(BATCHES, dumps, strict=True)) | {"batches.meta": pickle.dumps(meta, protocol)}


def unpack(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(monkeypatch, path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar10.ARCHIVE_MD5, path.name, md5)
    return path


@pytest.mark.parametrize("kind", ["py", "py2", "py5", "bin"])
@pytest.mark.parametrize("layout", ["archive", "beside", "unpacked", "parent"])
def test_cifar10_archives_and_folders_are_read(tmp_path, monkeypatch, kind, layout):
    files, stem = cifar_files(kind), f"cifar-10-batches-{kind[:2] if kind != 'bin' else kind}"
    archive = f"cifar-10-{'binary' if kind == 'bin' else 'python'}.tar.gz"
    if layout in ("archive", "beside"):
        members = {f"{stem}/{name}": content for name, content in files.items()}
        members |= {f"{stem}/readme.html": b"x", "../../evil": b"x", "/etc/evil": b"x"}
        members |= {f"../{next(iter(files))}": b"not from where the batches are"}
        place = pack(monkeypatch, tmp_path / "in" / archive, members)
        place = place if layout == "archive" else place.parent
    else:
        place = unpack(tmp_path / "in" / stem, files)
        place = place if layout == "unpacked" else place.parent
    before = sorted(tmp_path.rglob("*"))
    opened = open_dataset(DataConfig(dataset=f"cifar10:{place}", validation_fraction=0.1))
    assert sorted(tmp_path.rglob("*")) == before
    assert opened.class_names == cifar10.CLASS_NAMES and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [180, 20, 40]
    np.testing.assert_array_equal(opened.test.images, PLANES[5].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(opened.test.labels, LABELS[5])
    np.testing.assert_array_equal(opened.train.source.labels, np.concatenate(LABELS[:5]))
    image = PLANES[:5].reshape(200, 3, 32, 32)[opened.train.indices[7]]
    np.testing.assert_array_equal(opened.train[7], image.transpose(1, 2, 0))


def test_cifar10_grayscale(tmp_path):
    unpack(tmp_path / "set", cifar_files("bin"))
    opened = open_dataset(DataConfig(dataset=f"cifar10:{tmp_path}/set", grayscale=True))
    reference = Image.fromarray(PLANES[5, 7].transpose(1, 2, 0)).convert("L")
    assert opened.channels == 1
    np.testing.assert_array_equal(opened.test[7][..., 0], np.asarray(reference))


def test_cifar10_wrong_md5(tmp_path, monkeypatch):
    path = pack(monkeypatch, tmp_path / "cifar-10-python.tar.gz", {"x": b"y"})
    path.write_bytes(path.read_bytes() + b"0")
    refused(f"cifar10:{path}", "MD5", cifar10.ARCHIVE_MD5[path.name], "download")


def test_cifar10_official_md5():
    assert cifar10.ARCHIVE_MD5 == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    }


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_cifar10_malicious_pickle(tmp_path, name, protocol):
    attack = pickle.dumps({b"data": Malicious(tmp_path / "owned"), b"labels": []}, protocol)
    unpack(tmp_path / "set", cifar_files("py") | {name: attack})
    refused(f"cifar10:{tmp_path}/set", name, "asks for", "mkdir")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("py", "data_batch_1", b""),
        ("py", "data_batch_1", b"no pickle"),
        ("py", "test_batch", pickle.dumps([1, 2])),
        ("py", "test_batch", pickle.dumps({b"labels": [1]})),
        (
            "py",
            "test_batch",
            pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}),
        ),
        ("py", "test_batch", pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]})),
        ("py", "test_batch", pickle.dumps({b"data": np.zeros((1, 3072), "u1"), b"labels": [10]})),
        ("py", "test_batch", pickle.dumps({b"data": np.zeros((1, 3072), "u1"), b"labels": [-1]})),
        ("py", "batches.meta", pickle.dumps({b"label_names": [b"\xff"]})),
        ("bin", "batches.meta.txt", b"caf\xe9\n"),
        ("bin", "data_batch_2.bin", b""),
        ("bin", "data_batch_2.bin", b"1" * 3072),
        ("bin", "data_batch_2.bin", b"\x0b" * 3073),
    ],
)
def test_cifar10_broken(tmp_path, kind, name, content):
    unpack(tmp_path / "set", cifar_files(kind) | {name: content})
    refused(f"cifar10:{tmp_path}/set", name.removesuffix(".bin"))


def test_cifar10_missing(tmp_path):
    refused(f"cifar10:{tmp_path}", tmp_path, "no CIFAR-10 here", "cifar-10-python.tar.gz")
    refused(f"cifar10:{tmp_path}/none", "no CIFAR-10 here")
    files = cifar_files("bin")
    del files["data_batch_4.bin"]
    refused(f"cifar10:{unpack(tmp_path / 'set', files)}", "data_batch_4.bin not found")


def test_cifar10_size_is_bounded(tmp_path, monkeypatch):
    members = {f"cifar-10-batches-bin/{name}": x for name, x in cifar_files("bin").items()}
    path = pack(monkeypatch, tmp_path / "cifar-10-binary.tar.gz", members)
    folder = unpack(tmp_path / "set", cifar_files("bin"))
    monkeypatch.setattr(cifar10, "MAX_FILE_BYTES", 3073 * 40 - 1)
    refused(f"cifar10:{path}", "data_batch_1.bin", "too many")
    refused(f"cifar10:{folder}", "data_batch_1.bin", "too many")
