"""What strangers' words may do to a terminal: nothing."""

import pytest

from flax_resnet.text import listed, printable

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
