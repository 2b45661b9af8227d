"""BatchNorm's statistics equal those of PyTorch's processes under DistributedDataParallel.

Plain BatchNorm there takes the statistics of each process: `batch_norm_images` of as many images.
The statistics of all processes, those of nn.SyncBatchNorm, are the default here.
"""

import functools
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from equivalence_tests.numerics import ddp
from equivalence_tests.parity import engine, inputs, tolerances

ROOT = Path(__file__).parents[2]
PROCESSES = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=PROCESSES)
def traces(request, tmp_path_factory):
    """(number of processes, {kind: the traces of all processes})."""
    folder, count = tmp_path_factory.mktemp("ddp"), request.param
    flags = [sys.executable, "-m", ddp.__name__, str(folder)]
    each = [[*flags, str(number), str(count), str(inputs.SEED)] for number in range(count)]
    started = [subprocess.Popen(command, cwd=ROOT) for command in each]
    assert [process.wait(timeout=300) for process in started] == [0] * count
    return count, {kind: [read(folder / f"{kind}-{i}.npz") for i in range(count)]
                   for kind in ddp.KINDS}  # fmt: skip


def read(path) -> engine.Trace:
    trace = defaultdict(dict)
    for name, array in np.load(path).items():
        phase, _, name = name.partition(" ")
        trace[phase][name] = array
    return trace


def together(traces: list[engine.Trace]) -> engine.Trace:
    """One trace of all processes: activations of all images, means of losses and of buffers.

    Weights and their gradients are those of any process: DistributedDataParallel keeps them equal.
    """
    whole = {phase: dict(arrays) for phase, arrays in traces[0].items()}
    for name in whole["forward"]:
        whole["forward"][name] = np.concatenate([t["forward"][name] for t in traces])
    images = np.concatenate([t["gradient"]["images"] for t in traces])
    whole["gradient"]["images"] = images / len(traces)  # a loss is the mean of a process
    for phase in ("loss", "batch_norm"):
        for name, array in whole[phase].items():
            mean = np.mean([t[phase][name] for t in traces], axis=0)
            whole[phase][name] = mean.astype(array.dtype)
    return whole


@functools.cache
def ours(batch_norm_images=None) -> engine.Trace:
    return engine.run_jax(ddp.case(batch_norm_images=batch_norm_images))


def worst(got: engine.Trace, traces: list[engine.Trace]) -> float:
    """The largest error of any tensor."""
    return engine.worst(engine.compare(got, together(traces)), *engine.PHASES).norm_relative


def test_groups_are_the_batches_of_processes_with_plain_batch_norm(traces):
    count, found = traces
    images = ddp.case().labels.shape[1] // count
    assert worst(ours(images), found["own"]) <= tolerances.TRAJECTORY


def test_the_default_is_the_statistics_of_all_processes(traces):
    assert worst(ours(), traces[1]["all"]) <= tolerances.TRAJECTORY


@pytest.mark.control
def test_the_two_kinds_of_statistics_differ(traces):
    assert worst(ours(), traces[1]["own"]) > 1e6 * tolerances.TRAJECTORY
