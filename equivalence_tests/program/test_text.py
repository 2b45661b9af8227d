"""Text from files and names cannot control the terminal."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torch_ref
from equivalence_tests.program.command import ROOT, run_script
from flax_resnet import errors
from flax_resnet.commands import cli
from flax_resnet.data import sources
from flax_resnet.data.image_files import BadImage, refusal
from flax_resnet.errors import InputError
from flax_resnet.runs import views
from flax_resnet.text import listed, printable, say
from flax_resnet.weights import convert

STEERING = ["\x1b[31m", "\x07", "\r", "\n", "\x9b2J", "\u202e", "\u2066", "\u200f", "\u2028"]


@pytest.mark.parametrize("odd", STEERING, ids=ascii)
def test_what_steers_a_terminal_is_escaped(odd):
    shown = printable(f"layer1.{odd}weight")
    assert shown.isprintable() and shown.startswith("layer1.\\") and shown.endswith("weight")


def test_names_of_any_script_and_undecodable_bytes_can_be_printed():
    for name in ("moineau domestique", "雀", "Spatz ä", "عصفور"):
        assert printable(name) == name
    printable(b"caf\xe9".decode(errors="surrogateescape")).encode("utf-8")


def test_long_names_and_long_lists_are_cut():
    assert len(printable("x" * 10**7)) == 200
    assert len(printable("\u202e" * 300)) == 200
    assert printable("x" * 200) == "x" * 200
    assert listed("abcde") == "a, b, c, d, e"
    assert listed(range(3705)) == "0, 1, 2, 3, 4 and 3,700 more"
    assert listed(["\x1b", "b", "c"], limit=2) == "\\x1b, b and 1 more"


def test_a_password_in_a_url_is_not_printed():
    text = "HTTPS://ann:secret@here.org/a.pth, http://token@x; http://x/a@b and a@b"
    assert printable(text) == "HTTPS://***@here.org/a.pth, http://***@x; http://x/a@b and a@b"
    assert printable("http://" + "x" * 300 + "@here.org/") == "http://***@here.org/"


@pytest.fixture
def verbose():
    """Within this fixture commands are verbose; afterwards they are not."""
    cli.Parser().parse_args(["--verbose"])
    yield
    cli.Parser().parse_args([])
    assert listed(range(6)) == "0, 1, 2, 3, 4 and 1 more"


def test_on_request_nothing_is_left_out(verbose):
    assert listed(range(6)) == "0, 1, 2, 3, 4, 5"
    assert printable("x" * 300) == "x" * 300
    assert errors.verdict(InputError("x" * 9999)) == (2, "error: " + "x" * 9999)
    shapes = {f"layer{i}.weight": (i,) for i in range(1, 8)}
    missing = convert.faults(shapes, {})
    wrong = convert.faults(shapes, dict.fromkeys(shapes, np.zeros(9)))
    assert "layer7.weight" in missing[0] and len(wrong) == 7 and "more" not in str(missing + wrong)
    bad = [BadImage(f"{i}.png: not a readable image") for i in range(9)]
    assert "8.png" in str(refusal(bad, "")) and "more" not in str(refusal(bad, ""))
    empty = sources.Subset(sources.ArraySource(np.zeros((0, 8, 8, 1)), np.zeros(0)), np.arange(0))
    dataset = sources.DataSet(
        train=empty, validation=empty, test=empty, class_names=("a", "b"), channels=1,
        bad_images=tuple((f"{i}.png", "broken") for i in range(30)),
    )  # fmt: skip
    assert len(list(dataset.remarks())) == 30


def prints(path: Path) -> list[str]:
    """The places of a file where `print` is named."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [f"{path}:{n.lineno}" for n in nodes if isinstance(n, ast.Name) and n.id == "print"]


def test_what_is_printed_passes_through_one_function():
    """`say` escapes; torch_ref/loop.py prints numbers alone."""
    folders = ("flax_resnet", "torch_ref", "equivalence_tests/parity", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    allowed = {ROOT / "flax_resnet/text.py", ROOT / "torch_ref/loop.py"}
    assert len(files) > 100 and allowed < set(files)
    assert sum((prints(path) for path in set(files) - allowed), []) == []


def test_lines_are_said_whole_and_escaped(capsys):
    say("a\x1b[31m", "b" * 5000, file=sys.stderr)
    assert capsys.readouterr().err == "a\\x1b[31m\n" + "b" * 5000 + "\n"


def test_names_of_files_and_runs_reach_no_terminal(tmp_path, capsys):
    weights = {"model": dict(torch_ref.create_model("resnet20", num_classes=3).state_dict())}
    torch.save(weights, tmp_path / "a\x1b[31m.pth")
    outs = tmp_path / "b\x1b[2J.safetensors", tmp_path / "c\u202e.pth"
    for out in outs:
        outcome = run_script("convert.py", tmp_path / "a\x1b[31m.pth", out)
        assert outcome.status == 0 and out.exists()
        assert r"a\x1b[31m.pth: " in outcome.out
        assert not {"\x1b", "\u202e"} & set(outcome.out + outcome.err)
    views.warn("run\x1b[2J")
    assert capsys.readouterr().err == "run\\x1b[2J\n"


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "convert", "parity"])
def test_commands_explain_that_and_call_numbers_numbers(script):
    out = run_script(f"{script}.py", "--help").out
    assert "--verbose" in out and not re.search(r"--\S+ (N|X|TEXT)\b", out)
