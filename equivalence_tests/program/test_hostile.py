"""Malicious files and names: refused in one line with status 2, or harmless."""

import csv
import hashlib
import io
import json
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.table import Table

from equivalence_tests.program.command import refused, run_script
from flax_resnet.data import cifar10
from flax_resnet.errors import InputError
from flax_resnet.interop.weights_to_run import class_names
from flax_resnet.runs import plots, tables
from flax_resnet.runs.display import Display

MEGABYTE = 1 << 20


def test_an_archive_that_unpacks_to_gigabytes_is_refused(tmp_path):
    """A weights file is a zip, which torch writes without compression."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(MEGABYTE))
    assert path.stat().st_size < MEGABYTE
    refused(run_script("convert.py", path, tmp_path / "out.safetensors"), "compressed")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tensor_that_promises_terabytes_is_refused(tmp_path):
    path = tmp_path / "promise.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(10**12)}, path)
    refused(
        run_script("convert.py", path, tmp_path / "out.safetensors"), "whose tensors would take"
    )


def test_an_archive_writes_nowhere(tmp_path, monkeypatch):
    """Members with paths outside the folder and links are skipped; nothing is unpacked."""
    path = tmp_path / "set" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for name in ("../escaped.bin", "cifar-10-batches-bin/../../data_batch_1.bin"):
            archive.addfile(_member(name, 3073), io.BytesIO(bytes(3073)))
        link = _member("cifar-10-batches-bin/data_batch_1.bin", 0)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar10.ARCHIVE_MD5, path.name, md5)
    with pytest.raises(InputError, match="data_batch_1"):
        cifar10.read(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["set", path.name]


def _member(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info


NAMES = ("<script>alert(1)<|script>", "two\nlines", '"quoted", with comma', "[b]é")


def test_class_names_are_only_names(tmp_path):
    """Markup, newlines, commas and Rich's brackets in class names stay literal in all outputs."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(NAMES):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(6 if split == "test" else 12):
                pixels = rng.integers(0, 60, (9, 9, 3)).astype(np.uint8) + 60 * number
                path = tmp_path / "set" / split / name / f"{i}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    run, data = tmp_path / "run", f"folder:{tmp_path}/set"
    flags = [
        "--arch",
        "basic_cnn",
        "--dataset",
        data,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--validation-fraction",
        0.2,
    ]
    outcome = run_script("train.py", "--run-dir", run, "--devices", 1, *flags)
    assert outcome.status == 0, outcome.err
    with (run / "per_class.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == sorted(NAMES)
    image = tmp_path / "set" / "test" / NAMES[1] / "0.png"
    outcome = run_script("predict.py", run, image, "--json", tmp_path / "out.json")
    assert outcome.status == 0, outcome.err
    assert set(_words(json.loads((tmp_path / "out.json").read_text()))) >= set(NAMES)


def _words(value):
    """Every string in a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str):
        yield value


def test_a_folder_s_name_is_only_a_name(capsys):
    """Rich would replace ":b:" by an emoji."""
    Display().say("folder:b: 256 training images [red]")
    assert capsys.readouterr().out == "folder:b: 256 training images [red]\n"


def test_a_file_s_name_in_a_table_is_only_a_name(capsys):
    table = Table()
    table.add_column("image")
    table.add_row("photos/img[a].jpg :b: [red]")
    Display().show(table)
    assert "photos/img[a].jpg :b: [red]" in capsys.readouterr().out


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path, monkeypatch):
    """Names are drawn in a font that has them; without one, the class number is drawn."""
    names = ["鳥", "птица", "ptak", "a\u202eb"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion_matrix(tmp_path / "matrix.png", np.eye(4, dtype=int), names)
    monkeypatch.setattr(plots.font_manager.fontManager, "ttflist", [])
    assert plots._writable(names) == (["0", "птица", "ptak", "a\\u202eb"], ["DejaVu Sans"])


def test_names_of_runs_are_only_names_in_a_legend(tmp_path, monkeypatch):
    """Matplotlib would set $ as mathematics and leave a name with an underscore out."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    row = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5}
    names = ["$\\x$", "_a", "b\x1bc", "long" * 50]
    plots.comparison(tmp_path / "runs.png", {name: [row] for name in names}, "Runs")
    monkeypatch.undo()
    plots.save(drawn[0], tmp_path / "runs.png")
    shown = [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()]
    assert shown == ["$\\x$", " _a", "b\\x1bc", "long" * 14 + "l..."]


def test_a_carriage_return_in_a_name_ends_no_line_of_csv():
    rows = [{"class": "a\rb", "precision": 1.5}, {"class": 'c"d', "precision": 2.5}]
    text = tables.as_csv(rows).decode()
    assert text == 'class,precision\n"a\rb","1.5"\n"c""d",2.5\n'
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["class"] for row in found] == ["a\rb", 'c"d']


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffairplane\r\ncafe\u0301\r\n".encode())
    assert class_names(str(tmp_path / "names.txt"), 2) == ("airplane", "café")


def test_a_name_of_a_class_stands_once_and_on_one_line(tmp_path):
    (tmp_path / "names.txt").write_text("one\u2028line\ntwo\n", "utf-8")
    assert class_names(str(tmp_path / "names.txt"), 2) == ("one\u2028line", "two")
    with pytest.raises(InputError, match="given twice: a"):
        class_names("a,b,a", 3)
