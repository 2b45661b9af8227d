"""Data sets in ArrayRecord shards."""

import hashlib
import io
import json
import os
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.command import run_script
from equivalence_tests.program.image_folder import fill, picture, refused, upright
from flax_resnet.config import DataConfig
from flax_resnet.data import pipeline, shards
from flax_resnet.data.prepare import check_contents, contents
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError

SHARD = "train-00001-of-00003.array_record"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for split, number in (("train", 13), ("test", 3)):
        fill(folder / split / "wren", number, ".jpg")
        fill(folder / split / "ant", number + 1)
    return folder


@pytest.fixture
def written(folder, tmp_path):
    """The folder's images in four shards, three of them for training."""
    write(f"folder:{folder}", tmp_path / "set", "--images-per-shard", 10)
    return tmp_path / "set"


def write(dataset, out, *flags):
    outcome = run_script("shards.py", dataset, out, *flags)
    assert outcome.status == 0, outcome.err
    return outcome.out


def opened(dataset, **fields):
    return open_dataset(DataConfig(dataset=str(dataset), validation_fraction=0.2, **fields))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("fields", [{}, {"grayscale": True}, {"train_images": 12}])
def test_shards_are_the_same_data_set_as_their_folder(folder, written, fields):
    ours, theirs = opened(f"arrayrecord:{written}", **fields), opened(f"folder:{folder}", **fields)
    assert ours.class_names == theirs.class_names == ("ant", "wren")
    assert ours.channels == theirs.channels and ours.own_splits == theirs.own_splits
    for split in ("train", "validation", "test"):
        one, other = getattr(ours, split), getattr(theirs, split)
        np.testing.assert_array_equal(one.labels, other.labels)
        assert len(one) == len(other) > 0
        for index in range(len(one)):
            np.testing.assert_array_equal(one[index], other[index])


def test_batches_from_the_middle_of_an_epoch_are_those_of_the_folder(folder, written):
    order = pipeline.BatchOrder(num_images=22, batch_size=5, seed=3, epochs=2, rows=slice(1, 4))
    decoder = pipeline.Decoder(size=6, resize=6, random_resized_crop=True)
    ours, theirs = (
        list(pipeline.image_iterator(opened(data).train, decoder, order, num_workers=0, start=3))
        for data in (f"arrayrecord:{written}", f"folder:{folder}")
    )
    assert len(ours) == 5
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_records_are_the_files_and_reach_other_processes(folder, written):
    source = pickle.loads(pickle.dumps(opened(f"arrayrecord:{written}").test))
    files = sorted((folder / "test").rglob("*.*g"))
    assert [source.records[index] for index in range(7)] == [file.read_bytes() for file in files]


def test_checksums_are_those_of_sha256sum(written):
    sums = dict(
        reversed(line.split("  ")) for line in (written / "SHA256SUMS").read_text().splitlines()
    )
    assert sums.keys() == {path.name for path in written.iterdir()} - {"SHA256SUMS"}
    assert len(sums) == 5 and SHARD in sums
    for name, digest in sums.items():
        assert hashlib.sha256((written / name).read_bytes()).hexdigest() == digest


def test_every_flipped_bit_of_an_image_is_found(written):
    records = shards.read(str(written)).splits["train"][0]
    sound, rng = (written / SHARD).read_bytes(), random.Random(0)
    for index in range(9, 18):  # the records of the shard
        start = sound.index(records[index])
        flip(written / SHARD, start + rng.randrange(len(records[index])), rng.randrange(8))
        with pytest.raises(InputError, match=f"{SHARD}: a broken shard"):
            shards.read(str(written)).splits["train"][0][index]
        (written / SHARD).write_bytes(sound)


def test_other_flipped_bits_are_found_or_change_nothing(written):
    before = list(shards.read(str(written)).splits["train"][0])
    sound, rng = (written / SHARD).read_bytes(), random.Random(0)
    for position in [*range(0, 64, 3), *rng.sample(range(len(sound)), 20)]:
        flip(written / SHARD, position, rng.randrange(8))
        try:
            assert list(shards.read(str(written)).splits["train"][0]) == before
        except InputError as error:
            assert f"{SHARD}: a broken shard" in str(error)
        (written / SHARD).write_bytes(sound)


@pytest.mark.parametrize("kept", [0, 10, 65536, -1])
def test_a_truncated_shard_is_refused_when_it_is_opened(written, kept):
    content = (written / SHARD).read_bytes()
    (written / SHARD).write_bytes(content[:kept])
    with pytest.raises(InputError, match=f"{SHARD}: a broken shard .* bytes instead of"):
        shards.read(str(written))


def test_a_record_that_a_shard_has_lost_is_no_image(written):
    """ArrayRecord returns nothing for the records of a file without its end."""
    found = shards.read(str(written)).splits["train"][0]
    content = (written / SHARD).read_bytes()
    (written / SHARD).write_bytes(content[:65536])
    with pytest.raises(InputError, match=f"{SHARD}: a broken shard"):
        found[len(found) // 2]


def test_damage_is_one_line_with_the_name(written, tmp_path):
    content = (written / SHARD).read_bytes()
    flip(written / SHARD, content.index(b"IHDR"))
    outcome = run_script(
        "train.py", "--arch", "basic_cnn", "--dataset", f"arrayrecord:{written}",
        "--devices", 1, "--batch-size", 4, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert outcome.status == 2 and outcome.err.count("\n") == 1, outcome.err
    assert f"{written / SHARD}: a broken shard" in outcome.err
    assert not (tmp_path / "run").exists()


def test_sets_that_are_not_whole_are_refused(written, folder, tmp_path):
    place = f"arrayrecord:{written}"
    refused(f"arrayrecord:{tmp_path}/no*", "no file")
    refused(f"arrayrecord:{tmp_path}/*/*0-of-0000?.array_record", "2 of 3", "train-00002-of-00003")
    refused(f"arrayrecord:{written}/test-*", "no train split", "test")
    refused(f"arrayrecord:{written}/*.json", "no shard of", "index.json")
    refused(f"arrayrecord:{folder}/*/*/*", "4 folders")
    refused(f"arrayrecord:{folder}/test/ant", "index.json", "flax-resnet shards")
    (written / SHARD).rename(tmp_path / SHARD)
    refused(place, "1 of 3 shards missing", SHARD)
    (tmp_path / SHARD).rename(written / SHARD)
    flip(written / "index.json", (written / "index.json").read_bytes().index(b"wren"))
    refused(place, "index.json", "changed", "SHA256SUMS")


@pytest.mark.parametrize("runs, words", [
    ([[0, 5], [7, 4]], ["an image of class 7", "2 classes"]),
    ([[0, 5]], ["9 images instead of the 5 of index.json", SHARD]),
    ([[0, 10**15]], ["more images than bytes", SHARD]),
    ([[0, 10**30]], ["more images than bytes", SHARD]),
    ([[2**31, 1]], ["no index of shards"]),
])  # fmt: skip
def test_an_index_that_cannot_be_is_refused(written, runs, words):
    """Whoever forges an index writes its checksum, too."""
    index = json.loads((written / "index.json").read_bytes())
    index["shards"][SHARD]["runs"] = runs
    content = json.dumps(index).encode()
    (written / "index.json").write_bytes(content)
    lines = (written / "SHA256SUMS").read_text().splitlines(True)
    digest = hashlib.sha256(content).hexdigest()
    (written / "SHA256SUMS").write_text("".join(lines[:-1]) + f"{digest}  index.json\n")
    refused(f"arrayrecord:{written}", *words)


@pytest.mark.parametrize("name", ["index.json", "SHA256SUMS"])
def test_a_pipe_is_not_waited_for(written, name):
    (written / name).unlink()
    os.mkfifo(written / name)
    refused(f"arrayrecord:{written}", f"{name} is no file")


def test_a_pattern_may_leave_out_splits(written):
    own = opened(f"arrayrecord:{written}/train-*")
    assert own.own_splits == () and len(own.test) == 6


def test_a_run_notices_that_its_shards_were_written_anew(folder, written, tmp_path):
    before = contents(opened(f"arrayrecord:{written}"))
    check_contents(contents(opened(f"arrayrecord:{written}/*")), before)
    write(f"folder:{folder}", tmp_path / "other", "--resize", 4)
    with pytest.raises(InputError, match="data have changed.*files: SHA-256"):
        check_contents(contents(opened(f"arrayrecord:{tmp_path}/other")), before)


def test_larger_images_are_resized_and_keep_their_orientation(tmp_path):
    for name in ("ant", "wren"):
        fill(tmp_path / "set" / name, 3)
    turned = tmp_path / "set/ant/turned.jpg"
    picture(7, (40, 60)).save(turned, exif=upright(6), quality=95)
    out = write(f"folder:{tmp_path}/set", tmp_path / "out", "--resize", 20)
    assert "EXIF rotation" in out
    source = shards.read(str(tmp_path / "out")).splits["train"][0]
    assert source[0] == (tmp_path / "set/ant/00.png").read_bytes()
    with Image.open(io.BytesIO(source[3])) as image:
        assert image.format == "JPEG" and image.size == (30, 20)
    upright_set = opened(f"arrayrecord:{tmp_path}/out", test_fraction=0.0, exif_transpose=True)
    shapes = [
        image.shape[:2] for split in (upright_set.train, upright_set.validation) for image in split
    ]
    assert shapes.count((30, 20)) == 1


def test_arrays_are_written_as_png(tmp_path):
    write("digits", tmp_path / "digits", "--images-per-shard", 1000)
    ours, theirs = opened(f"arrayrecord:{tmp_path}/digits"), opened("digits")
    assert ours.channels == 1 and ours.class_names == theirs.class_names
    np.testing.assert_array_equal(ours.test.labels, theirs.test.labels)
    for index in range(20):
        np.testing.assert_array_equal(ours.test[index], theirs.test[index])


def test_a_broken_image_is_not_written(tmp_path):
    for name in ("ant", "wren"):
        fill(tmp_path / "set" / name, 4)
    (tmp_path / "set/ant/01.png").write_bytes(b"broken")
    outcome = run_script("shards.py", f"folder:{tmp_path}/set", tmp_path / "out")
    assert outcome.status == 2 and "01.png" in outcome.err and "--on-bad-image" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    out = write(f"folder:{tmp_path}/set", tmp_path / "out", "--on-bad-image", "skip")
    assert "7 images" in out and "left out" in out


@pytest.mark.parametrize("flags, words", [
    (["--images-per-shard", "0"], ["--images-per-shard", "at least 1"]),
    (["--resize", "-3"], ["--resize", "at least 1"]),
    (["--interpolation", "bicubic"], ["--interpolation", "--resize"]),
    (["--on-bad-image", "skip"], ["--on-bad-image", "digits"]),
])  # fmt: skip
def test_wrong_flags(flags, words, tmp_path):
    outcome = run_script("shards.py", "digits", tmp_path / "out", *flags)
    assert outcome.status == 2 and all(word in outcome.err for word in words), outcome.err
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in tmp_path, tmp_path / "link":
        outcome = run_script("shards.py", "digits", place)
        assert outcome.status == 2 and "exists" in outcome.err
