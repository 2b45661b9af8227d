"""What processes of their own are given to do: they import this file and little else."""

import itertools
import time


def counts(number: int):
    """number, number + 1, ... without end."""
    return itertools.count(number)


def three(number: int):
    """Three items."""
    return [(number, n) for n in range(3)]


def broken(number: int):
    """An item, and an error."""
    yield "sound"
    raise LookupError(f"image {number} is broken")


def stuck(number: int):
    """Nothing, for a long time."""
    time.sleep(1000)
    yield
