"""Decoding processes deliver in order and end with their parent."""

import functools
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from equivalence_tests.program import jobs
from equivalence_tests.program.command import ROOT
from flax_resnet.data import pipeline
from flax_resnet.data.sources import ArraySource
from flax_resnet.data.workers import InTurn, WorkerDied


def pids(in_turn) -> list[int]:
    return [process.pid for process in in_turn._processes]


def is_there(pid: int) -> bool:
    """True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_item_of_each_in_turn_until_the_first_has_none():
    everything = InTurn(jobs.three, 2)
    assert list(everything) == [(n, k) for k in range(3) for n in range(2)]
    assert not any(map(is_there, pids(everything)))


def test_batches_are_those_of_this_process_from_any_step_on():
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 9, 3)).astype(np.uint8)
    source = ArraySource(images, np.arange(20))
    order = pipeline.BatchOrder(num_images=20, batch_size=4, seed=0, epochs=2)
    decoder = pipeline.Decoder(size=8, resize=8, random_resized_crop=True)
    alone, several = (
        list(pipeline.image_iterator(source, decoder, order, num_workers=count, start=3))
        for count in (0, 2)
    )
    assert len(alone) == 7
    for one, other in zip(alone, several, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_an_error_is_raised_where_the_item_is_asked_for():
    everything = InTurn(jobs.broken, 2)
    assert [next(everything), next(everything)] == ["sound", "sound"]
    with pytest.raises(LookupError, match="image 0 is broken"):
        next(everything)
    everything.close()


def test_a_process_that_was_killed_is_named_and_the_others_end():
    everything = InTurn(jobs.counts, 2)
    next(everything)
    os.kill(pids(everything)[1], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"killed \(signal 9\), perhaps for lack of memory"):
        for _ in range(10**7):
            next(everything)
    assert not any(map(is_there, pids(everything)))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_left_to_the_parent(signum):
    """Workers ignore signals from their start, before Python runs."""
    everything = InTurn(jobs.counts, 1)
    os.kill(*pids(everything), signum)
    assert [next(everything) for _ in range(3)] == [0, 1, 2]
    everything.close()


def test_what_they_map_lives_as_long_as_they_do():
    """A pickled source refers to files of this process, which end with the source."""
    make = functools.partial(jobs.counts)
    held = weakref.ref(make)
    everything = InTurn(make, 1)
    del make
    assert held() is not None
    everything.close()


def test_they_end_when_nobody_holds_their_iterator():
    everything = InTurn(jobs.counts, 1)
    (pid,) = pids(everything)
    del everything
    assert not is_there(pid)


# Imports the module alone, because the package would import JAX.
PARENT = f"""
import sys, time
from equivalence_tests.program import jobs
sys.path.append({str(ROOT / "flax_resnet" / "data")!r})
from workers import InTurn
everything = InTurn(jobs.{{job}}, 2)
if {{begun}}: next(everything), next(everything)
print(*(process.pid for process in everything._processes), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("job,begun", [("counts", True), ("stuck", False)])
def test_they_end_with_a_parent_that_is_killed(job, begun):
    """The parent is killed between two items, or before the first one."""
    shared = set(os.listdir("/dev/shm"))
    program = PARENT.format(job=job, begun=begun)
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(map(is_there, children))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(is_there, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, children)) and set(os.listdir("/dev/shm")) <= shared
