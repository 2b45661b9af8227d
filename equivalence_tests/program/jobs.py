"""Jobs for the worker processes in tests; a worker imports this file and little else."""

import itertools
import time


def counts(number: int):
    """An endless iterator: number, number + 1, ..."""
    return itertools.count(number)


def three(number: int):
    """Three items."""
    return [(number, n) for n in range(3)]


def broken(number: int):
    """One item, then an error."""
    yield "sound"
    raise LookupError(f"image {number} is broken")


def stuck(number: int):
    """A first item that takes a long time."""
    time.sleep(1000)
    yield
