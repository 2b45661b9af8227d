"""Data sets: what is read, how it is split, and every bad input as one clear line."""

import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from flax_resnet.config import DataConfig, InputError
from flax_resnet.data import cifar10, sources
from flax_resnet.data.sources import ArraySource, FolderSource, Subset, open_dataset, read_image


def picture(seed=0, size=(12, 9), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def refused(dataset, *words, **fields):
    with pytest.raises(InputError) as error:
        opened = open_dataset(DataConfig(dataset=str(dataset), **fields))
        for split in (opened.train, opened.validation, opened.test):
            [split[index] for index in range(len(split))]
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# --- folders ---


def fill(folder, number=10, suffix=".png"):
    folder.mkdir(parents=True)
    for index in range(number):
        picture(index, size=(8 + index % 3, 8)).save(folder / f"{index:02}{suffix}")


@pytest.fixture
def tree(tmp_path):
    """Three splits of the classes ant, bee and Cow."""
    root = tmp_path / "set"
    for split, number in (("train", 10), ("val", 4), ("test", 5)):
        for name in ("bee", "ant", "Cow"):
            fill(root / split / name, number)
    return root


def test_folder_with_three_splits(tree):
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert opened.class_names == ("Cow", "ant", "bee") and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [30, 12, 15]
    reference = torchvision.datasets.ImageFolder(tree / "train")
    assert opened.train.names == tuple(path for path, _ in reference.samples)
    assert opened.train.labels.dtype == np.int32
    np.testing.assert_array_equal(opened.train.labels, reference.targets)
    for index in (0, 11, 29):
        np.testing.assert_array_equal(opened.train[index], np.asarray(reference[index][0]))


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folder_with_one_held_out_split_tests_on_it(tree, held_out):
    (tree / "val").rename(tree / "other")
    shutil.rmtree(tree / "test")
    (tree / "other").rename(tree / held_out)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", validation_fraction=0.2))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [24, 6, 12]
    assert all(f"/{held_out}/" in name for name in opened.test.names)


def test_folder_of_classes_is_split_both_ways(tree):
    config = DataConfig(dataset=f"folder:{tree}/train", test_fraction=0.3, validation_fraction=0.2)
    opened = open_dataset(config)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [16, 5, 9]
    assert np.bincount(opened.test.labels).tolist() == [3, 3, 3]
    names = [name for s in (opened.train, opened.validation, opened.test) for name in s.names]
    assert len(set(names)) == 30


def test_folder_grayscale_is_torchvisions(tree):
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", grayscale=True))
    reference = torchvision.transforms.Grayscale()(Image.open(opened.train.names[3]))
    assert opened.channels == 1
    np.testing.assert_array_equal(opened.train[3][..., 0], np.asarray(reference))


def test_folder_hidden_ignored_and_nested(tree):
    (tree / ".cache").mkdir()
    (tree / "train" / ".hidden").mkdir()
    picture().save(tree / "train/ant/.thumb.png")
    (tree / "train/ant/notes.txt").write_text("no image")
    (tree / "train/ant/more").mkdir()
    picture().save(tree / "train/ant/more/UPPER.JPEG")
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert len(opened.train) == 31 and opened.ignored_files == 1


def test_folder_refusals(tree, tmp_path):
    refused(f"folder:{tmp_path}/nowhere", "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(f"folder:{tmp_path}/empty", "empty", "no class folder")
    fill(tmp_path / "one" / "ant")
    refused(f"folder:{tmp_path}/one", "ant", "only")
    (tree / "valid").mkdir()
    refused(f"folder:{tree}", "valid", "train")
    (tree / "valid").rename(tree / "validation")
    refused(f"folder:{tree}", "validation", "val")
    (tree / "validation").rmdir()
    (tree / "train/ant").rename(tree / "train/wasp")
    refused(f"folder:{tree}", "missing wasp", "extra ant")


def test_folder_without_training_split(tree):
    (tree / "train").rename(tree.parent / "elsewhere")
    refused(f"folder:{tree}", "must have train", "test, val")


def test_folder_class_without_image(tree):
    for path in (tree / "val/bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(f"folder:{tree}", "no image", "bee", "validation")


@pytest.mark.parametrize("link", ["train/ant/link.png", "train/ant/sub", "train/wasp", "test/ant"])
def test_folder_link_out_is_refused(tree, tmp_path, link):
    fill(tmp_path / "outside")
    target = tmp_path / "outside" / ("00.png" if link.endswith("png") else "")
    path = tree / link
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(target)
    refused(f"folder:{tree}", path, "symbolic link")


def test_folder_link_inside_is_followed_and_a_loop_refused(tree):
    (tree / "train/ant/link.png").symlink_to(tree / "train/bee/00.png")
    assert len(open_dataset(DataConfig(dataset=f"folder:{tree}")).train) == 31
    (tree / "train/ant/loop").symlink_to(tree / "train/ant")
    refused(f"folder:{tree}", "loop", "symbolic link")


# --- image files ---


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK"])
def test_read_image_modes(tmp_path, mode, suffix):
    path = tmp_path / f"image{suffix}"
    try:
        picture(mode=mode).save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} has no {mode}")
    reference = Image.open(path).convert("RGB")  # torchvision's ImageFolder
    color, gray = read_image(path, 3), read_image(path, 1)
    assert color.shape == (12, 9, 3) and gray.shape == (12, 9, 1) and gray.dtype == np.uint8
    np.testing.assert_array_equal(color, np.asarray(reference))
    np.testing.assert_array_equal(gray[..., 0], np.asarray(reference.convert("L")))


def test_read_image_scales_16_bits(tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 1)[..., 0], levels)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png", 3)[..., 2], levels)


def test_read_image_refuses_pixels_without_a_range(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    for name in ("float.tif", "deep.tif"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            read_image(tmp_path / name, 3)


def test_read_image_transparent_palette_and_exif(tmp_path):
    palette = picture(mode="P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    picture().save(tmp_path / "turned.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        color = read_image(tmp_path / "palette.png", 3)
        assert read_image(tmp_path / "turned.jpg", 3).shape == (12, 9, 3)
    np.testing.assert_array_equal(color, np.asarray(palette.convert("RGB")))


def test_read_image_first_frame(tmp_path):
    frames = [picture(seed, mode="P") for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(
        read_image(tmp_path / "moving.gif", 3), np.asarray(frames[0].convert("RGB"))
    )


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "short.jpg": encoded(picture(size=(64, 64)), format="JPEG")[:-900],
    "short.png": encoded(picture(size=(64, 64)), format="PNG")[:-900],
}


def test_read_image_leaves_other_decoders_alone(tmp_path):
    (tmp_path / "script.png").write_bytes(encoded(picture(), format="EPS"))
    with pytest.raises(InputError, match="no known format"):  # and no Ghostscript started
        read_image(tmp_path / "script.png", 3)


@pytest.mark.parametrize("name", BROKEN)
def test_read_image_broken(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(InputError, match=f"{tmp_path / name}: not a readable image \\(.+\\)$"):
        read_image(tmp_path / name, 3)


def test_read_image_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    for name in ("pipe.png", "gone.png", "missing.png"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            read_image(tmp_path / name, 3)


@pytest.mark.parametrize("limit", [100, 60, 20])  # PIL: fine, a warning, an error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_read_image_decompression_bomb(tmp_path, monkeypatch, limit):
    picture(size=(10, 10)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 100:
        assert read_image(tmp_path / "bomb.png", 3).shape == (10, 10, 3)
    else:
        with pytest.raises(InputError, match="bomb.png: not a readable image .*pixels"):
            read_image(tmp_path / "bomb.png", 3)


def break_some(tree):
    bad = [tree / "train/ant/03.png", tree / "test/bee/01.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    return [str(path) for path in bad]


def test_bad_images_are_skipped(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}", on_bad_image="skip"))
    assert [path for path, _ in opened.bad_images] == bad
    assert all(reason.startswith("not a readable image (") for _, reason in opened.bad_images)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [29, 12, 14]
    assert not set(bad) & {*opened.train.names, *opened.test.names}
    assert [opened.train[index].shape[2] for index in range(29)] == [3] * 29


def test_bad_images_are_errors_when_met(tree):
    bad = break_some(tree)
    opened = open_dataset(DataConfig(dataset=f"folder:{tree}"))
    assert len(opened.train) == 30 and opened.bad_images == ()
    refused(f"folder:{tree}", bad[0])


def test_class_of_bad_images_only(tree):
    for path in (tree / "val/bee").iterdir():
        path.write_bytes(b"")
    refused(f"folder:{tree}", "bee", "none of 4", on_bad_image="skip")


# --- splits ---


def test_digits():
    opened = open_dataset(DataConfig())
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [1293, 144, 360]
    assert opened.channels == 1 and opened.class_names == tuple("0123456789")
    whole, original = opened.train.source.source, load_digits()
    np.testing.assert_array_equal(
        np.stack([whole[i] for i in range(9)])[..., 0], np.round(original.images[:9] / 16 * 255)
    )
    np.testing.assert_array_equal(whole.labels, original.target)
    one, two = (open_dataset(DataConfig(split_seed=seed)).test.indices for seed in (0, 1))
    np.testing.assert_array_equal(one, opened.test.indices)
    assert (one != two).any()


def opened_labels(monkeypatch, labels, **fields):
    """`open_dataset` on images that say their own number."""
    labels = np.asarray(labels, np.int32)
    source = ArraySource(np.arange(len(labels))[:, None, None, None], labels)
    facts = {"class_names": ("a", "b", "c"), "channels": 1}
    monkeypatch.setattr(sources, "_digits", lambda *_: ({"train": source}, facts))
    return open_dataset(DataConfig(**fields))


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    sizes=st.lists(st.integers(8, 60), min_size=2, max_size=6),
    test=st.floats(0.25, 0.5),
    validation=st.floats(0.25, 0.5),
    used=st.floats(0.5, 0.7),
    seed=st.integers(0, 99),
)
def test_splits_are_stratified(monkeypatch, sizes, test, validation, used, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    fields = dict(test_fraction=test, validation_fraction=validation, split_seed=seed)
    whole = opened_labels(monkeypatch, labels, **fields)
    members = [
        [int(s[index].item()) for index in range(len(s))]
        for s in (whole.train, whole.validation, whole.test)
    ]
    assert sorted(sum(members, [])) == list(range(len(labels)))  # disjoint and complete
    for split, own in zip((whole.train, whole.validation, whole.test), members, strict=True):
        np.testing.assert_array_equal(split.labels, labels[own])

    total = np.bincount(labels)
    rest = total - np.bincount(whole.test.labels, minlength=len(total))
    within_one(whole.test, total)
    within_one(whole.validation, rest)
    number = max(len(sizes), int(used * len(whole.train)))
    few = opened_labels(monkeypatch, labels, train_images=number, **fields)
    assert len(few.train) == number and set(few.train.names or ()) == set()
    within_one(few.train, np.bincount(whole.train.labels))
    assert {few.train[i].item() for i in range(number)} <= set(members[0])


def within_one(split, counts):
    share = counts * len(split) / counts.sum()
    assert np.abs(np.bincount(split.labels, minlength=len(counts)) - share).max() <= 1


def test_validation_may_be_empty(monkeypatch):
    opened = opened_labels(monkeypatch, [0, 1, 2] * 9, validation_fraction=0)
    assert len(opened.validation) == 0 and opened.validation.labels.shape == (0,)


@pytest.mark.parametrize(
    ("labels", "fields", "words"),
    [
        ([0] * 20 + [1], {}, "the smallest of 1"),
        ([0, 1, 2] * 9, {"test_fraction": 0}, "test_fraction 0"),
        ([0, 1, 2] * 9, {"test_fraction": 0.01}, "test_fraction 0.01"),
        ([0, 1, 2] * 9, {"validation_fraction": 0.99}, "validation_fraction 0.99"),
        ([0] * 400 + [1] * 2, {"test_fraction": 0.98}, "stratified"),
    ],
)
def test_splits_that_cannot_be(monkeypatch, labels, fields, words):
    with pytest.raises(InputError, match=words):
        opened_labels(monkeypatch, labels, **fields)


def test_limits_are_upper_limits(monkeypatch):
    labels = [0, 1, 2] * 20
    opened = opened_labels(monkeypatch, labels, train_images=2, eval_images=5)
    assert (len(opened.train), len(opened.validation), len(opened.test)) == (2, 5, 5)
    whole = opened_labels(monkeypatch, labels)
    more = opened_labels(monkeypatch, labels, train_images=10**6, eval_images=10**6)
    assert [len(more.train), len(more.test)] == [len(whole.train), len(whole.test)]


def test_sources_cross_process_borders(tree):
    source = Subset(open_dataset(DataConfig(dataset=f"folder:{tree}")).train, np.array([4, 2]))
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy.source, FolderSource) and copy.names == source.names
    np.testing.assert_array_equal(copy[1], source[np.int64(1)])


# --- CIFAR-10 archives ---

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
def test_cifar10(tmp_path, monkeypatch, kind, layout):
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


# --- TensorFlow Datasets, without TensorFlow ---


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    """Makes a prepared set: split -> number of images; feature of the label; modes by number."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")

    def make(set_name, splits, label=None, modes=("RGB",), unlabelled=()):
        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = set_name
            VERSION = tfds.core.Version("1.2.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(None, None, 1 if modes == ("L",) else 3)),
                    "label": label or tfds.features.ClassLabel(names=["cat", "dog"]),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {split: self._generate_examples(split, n) for split, n in splits.items()}

            def _generate_examples(self, split, number):
                for index in range(number):
                    image = picture(index, (8, 6 + index % 2), modes[index % len(modes)])
                    yield index, {"image": image, "label": -1 if split in unlabelled else index % 2}

        Builder(data_dir=folder).download_and_prepare(file_format="array_record")
        return f"tfds:{set_name}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield make


def test_tfds(tfds_set):
    opened = open_dataset(DataConfig(dataset=tfds_set("pets", {"train": 40, "test": 10})))
    assert opened.class_names == ("cat", "dog") and opened.channels == 3
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [36, 4, 10]
    np.testing.assert_array_equal(sorted(opened.test.labels), [0] * 5 + [1] * 5)
    shown = {opened.test[index].tobytes() for index in range(10)}
    assert shown == {np.asarray(picture(i, (8, 6 + i % 2))).tobytes() for i in range(10)}
    copy = pickle.loads(pickle.dumps(opened.test))
    np.testing.assert_array_equal(copy[3], opened.test[3])
    assert "tensorflow" not in sys.modules


def test_tfds_version_and_channels(tfds_set):
    name = tfds_set("gray_pets", {"train": 30, "validation": 8}, modes=("L",))
    opened = open_dataset(DataConfig(dataset=f"{name}:1.2.0"))
    assert opened.channels == 1 and opened.train[0].shape[-1] == 1
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [27, 3, 8]
    refused(f"{name}:9.9.9", "gray_pets:9.9.9", "tfds build")


def test_tfds_mixed_modes_and_grayscale(tfds_set):
    name = tfds_set("mixed_pets", {"train": 40}, modes=("RGB", "L", "RGBA"))
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [28, 4, 8]
    assert {opened.train[index].shape[-1] for index in range(28)} == {3}
    gray = open_dataset(DataConfig(dataset=name, grayscale=True))
    reference = Image.fromarray(opened.train[5]).convert("L")
    np.testing.assert_array_equal(gray.train[5][..., 0], np.asarray(reference))


def test_tfds_unlabelled_test_split(tfds_set):
    name = tfds_set("secret", {"train": 20, "validation": 6, "test": 5}, unlabelled=("test",))
    opened = open_dataset(DataConfig(dataset=name))
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [18, 2, 6]


def test_tfds_prepared_without_random_access(tfds_set):
    name = tfds_set("sequential", {"train": 20})
    path = Path(os.environ["TFDS_DATA_DIR"]) / "sequential/1.2.0/dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    refused(name, "TFRECORD", "tfds build sequential", "--data_dir=NEW_FOLDER")


def test_tfds_refusals(tfds_set, monkeypatch):
    import tensorflow_datasets as tfds

    refused("tfds:no_such_set", "no_such_set", "not found", "tfds build no_such_set")
    name = tfds_set("numbers", {"train": 4}, label=tfds.features.Scalar(np.int64))
    refused(name, "image, label", "ClassLabel")
    refused(tfds_set("held_out", {"test": 4}), "no train split", "test")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: 1 / 0)
    refused("tfds:mnist", "division by zero", "tfds build mnist --file_format=array_record")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused("tfds:mnist", "uv run --extra tfds", 'pip install -e ".[tfds]"')


def test_tfds_registered_set_under_mock_data(tmp_path, monkeypatch):
    """TFDS's own CIFAR-10 class, with made-up records."""
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    png = [encoded(picture(index, (32, 32)), format="PNG") for index in range(50)]
    records = [{"image": png[index], "label": index % 10} for index in range(50)]
    folder = tmp_path / "cifar10/3.0.2"
    folder.mkdir(parents=True)
    splits = [{"name": n, "shardLengths": ["50"], "numBytes": "1"} for n in ("train", "test")]
    info = {"name": "cifar10", "version": "3.0.2", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    fake = dict(
        data_dir=str(tmp_path), as_data_source_fn=lambda self, split, decoders=None: records
    )
    with tfds.testing.mock_data(**fake):
        opened = open_dataset(DataConfig(dataset="tfds:cifar10", validation_fraction=0.2))
    assert len(opened.class_names) == 10 and opened.train[0].shape == (32, 32, 3)
    assert [len(s) for s in (opened.train, opened.validation, opened.test)] == [40, 10, 50]
    with pytest.raises(InputError, match=r"tfds:cifar10.*\[0\]: not a readable image"):
        records[0] = {"image": b"broken", "label": 0}
        opened.test[0]
