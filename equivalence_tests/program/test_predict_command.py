"""The predict command, and predictions in Python."""

import csv
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.insects import CLASSES
from flax_resnet.commands import cli, predict
from flax_resnet.data import sources
from flax_resnet.errors import InputError
from flax_resnet.interop.loaded_run import load_run, predict_files


@pytest.fixture
def some_bad(tmp_path, folder):
    """A copy of the folder of bees in which two files are no images."""
    shutil.copytree(folder / "test" / "bee", tmp_path / "photos")
    for name in ("03.png", "05.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    return tmp_path / "photos"


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
        assert read.call_count <= 12
        assert len(list(outcomes)) == 199
    with pytest.raises(InputError, match="takes a list of paths"):
        next(predict_files(run, picture))


def test_predict_files_decodes_in_parallel(insects, folder):
    """Four images are read at the same time, or the barrier breaks."""
    run, picture = load_run(insects), folder / "test" / "bee" / "00.png"
    read, four = sources.read_image, threading.Barrier(4, timeout=20)

    def read_together(*args, **kwargs):
        four.wait()
        return read(*args, **kwargs)

    with mock.patch.object(sources, "read_image", read_together):
        assert len(list(predict_files(run, [picture] * 8))) == 8


def test_the_network_computes_a_batch_while_the_one_before_is_used(insects, folder):
    run, picture, events = load_run(insects), folder / "test" / "bee" / "00.png", []
    run = replace(run, config=cli.merge(run.config, {"eval_batch_size": 2}))

    class Computed:
        def __init__(self, batch):
            events.append("start")
            self.rows = np.full((len(batch), 2), 0.5)

        def __array__(self, *args, **kwargs):
            events.append("fetch")
            return self.rows

    with mock.patch.object(type(run), "_probabilities", Computed):
        assert len(list(predict_files(run, [picture] * 6))) == 6
    assert events == ["start", "start", "fetch", "start", "fetch", "fetch"]


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


def test_predict_does_not_take_the_plots_of_a_run_for_images(insects, folder):
    image = next((folder / "test" / "bee").iterdir())
    refused(
        run_script("predict.py", insects, image, insects), "is a run: it goes before the images"
    )
    refused(run_script("predict.py", insects, insects.parent), f"before the images, as {insects}")
    refused(run_script("predict.py", insects, image, "torchvision:resnet18"), "before the images")
