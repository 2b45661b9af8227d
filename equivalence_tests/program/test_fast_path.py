"""Properties of the program that make training fast, checked without a clock."""

import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from unittest import mock

import jax
import numpy as np
import pytest

from equivalence_tests.program.command import ROOT
from equivalence_tests.program.test_compiled import Program
from flax_resnet.commands import cli
from flax_resnet.config import ParallelConfig, TrainConfig
from flax_resnet.data.pipeline import Decoder
from flax_resnet.devices.parallel import Engine
from flax_resnet.runs import environment
from flax_resnet.runs.display import Display
from flax_resnet.training import loop
from flax_resnet.training.fit import fit

SMALL = {
    "epochs": "2",
    "batch_size": "32",
    "log_steps": "5",
    "model": {"arch": "basic_cnn"},
    "data": {"train_images": "640"},
    "parallel": {"devices": "1"},
}


@pytest.fixture(scope="module", params=["auto", "none"])
def watched(request, tmp_path_factory):
    """A training with and without images on the device.

    Yields the cache setting, counts of operations, arrays sent at each step, and resident arrays.
    """
    config = cli.merge(TrainConfig(), SMALL)
    config = cli.merge(config, {"data": {"cache": request.param, "train_images": "640"}})
    counts, decodings, sent, resident = Counter(), Counter(), [], {}
    shard, drain, decode = Engine.shard, loop.log_steps, Decoder.__call__
    wait = jax.block_until_ready

    def counted_shard(engine, batches):
        sent.append({name: array.dtype for name, array in batches[0].items()})
        return shard(engine, batches)

    def counted_decoding(decoder, image, draw=None):
        decodings[image.tobytes()] += 1
        return decode(decoder, image, draw)

    def counted_wait(metrics):
        counts["waits"] += len(metrics)
        return wait(metrics)

    def counted_drain(run):
        counts["fetches"] += 1
        resident.update(run.resident)
        return drain(run)

    with (
        mock.patch.object(Engine, "shard", counted_shard),
        mock.patch.object(loop, "log_steps", counted_drain),
        mock.patch.object(Decoder, "__call__", counted_decoding),
        mock.patch.object(jax, "block_until_ready", counted_wait),
    ):
        fit(config, tmp_path_factory.mktemp("fast") / "run", display=Display())
    counts["decodings"] = max(decodings.values())
    return request.param, counts, sent, resident


def test_images_that_fit_stay_on_the_device_as_they_are(watched):
    """A step sends image indices only; without resident images it sends uint8 images."""
    cache, _, sent, resident = watched
    assert len(sent) == 40
    if cache == "auto":
        assert all(batch == {"index": np.int32} for batch in sent)
        assert isinstance(resident["image"], jax.Array) and resident["image"].dtype == np.uint8
    else:
        assert all(batch["image"] == np.uint8 for batch in sent) and not resident


def test_images_that_fit_are_decoded_once(watched):
    """Without resident images there are four passes: two epochs, statistics, last evaluation."""
    cache, counts, _, _ = watched
    assert counts["decodings"] == (1 if cache == "auto" else 4)


def test_a_dispatch_waits_for_the_fourth_before_it_only(watched):
    """After the fetch at every fifth step no dispatch is in flight."""
    assert watched[1]["waits"] == 2 * 20 // 5


def test_metrics_are_fetched_once_a_log_interval(watched):
    """Two epochs of 20 steps are logged every 5 steps."""
    assert watched[1]["fetches"] == 2 * 20 // 5


def test_the_state_of_a_step_is_donated():
    program = Program("basic_cnn", ParallelConfig(devices=1))
    state, resident, batch = program.arguments()
    program.engine.compile_train(program.train_step, 1)(state, resident, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((resident, batch)))


def test_several_steps_are_one_program():
    """The compiled program contains a loop; one call runs all steps."""
    program = Program("basic_cnn", ParallelConfig(devices=1, steps_per_dispatch=4))
    state, resident, _ = program.arguments()
    index = {"index": np.arange(16, dtype=np.int32)}
    step = program.engine.compile_train(program.train_step, 4)
    batches = program.engine.shard([index] * 4)
    assert " while(" in step.lower(state, resident, batches).compile().as_text()
    state, metrics = step(state, resident, batches)
    assert int(state.step) == 4 and metrics["loss"].shape == (4,)


def test_several_steps_are_sent_at_once_where_that_sends_no_images():
    """Batches of images are sent singly: 20 would fill a GPU's memory and delay a stop."""
    engine = Engine(ParallelConfig(devices=1))
    assert engine.steps_per_dispatch(resident=True) == 1
    engine.devices = [mock.Mock(platform="gpu")]
    assert engine.steps_per_dispatch(resident=True) == 20
    assert engine.steps_per_dispatch(resident=False) == 1
    asked = Engine(ParallelConfig(devices=1, steps_per_dispatch=3))
    assert asked.steps_per_dispatch(resident=False) == 3


@pytest.mark.parametrize("wanted", [True, False])
def test_compiled_programs_are_kept_unless_asked_not_to(tmp_path, monkeypatch, wanted):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        values = {} if wanted else {"compilation_cache": "false"}
        environment.configure_jax(cli.merge(TrainConfig(), values))
        expected = str(tmp_path / "flax_resnet" / "jax") if wanted else None
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("place", ["~/.cache", "/etc/hostname/.cache"])
def test_without_a_home_no_programs_are_kept(monkeypatch, place):
    """The user has no entry in passwd, or a home that is no directory."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(environment.os.path, "expanduser", lambda path: place)
    monkeypatch.setattr(environment.os, "access", lambda path, mode: os.path.isdir(path))
    assert environment._cache() is None


def test_below_a_writable_file_no_programs_are_kept(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert environment._cache() is None


CALLS = """
import resource, sys
if sys.argv[1] == "kept":
    from flax_resnet.commands import memory
import jax, jax.numpy as jnp
f = jax.jit(lambda x: x + 1)
x = jnp.ones(25_000_000)  # 100 MB, 24,414 pages
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def page_faults(how: str) -> int:
    """Page faults of a program that returns a large array: the minimum over many calls.

    On a busy machine, calls sometimes overlap and touch new pages even with kept memory.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's allocator")
    if metadata.entry_points(group="jax_plugins"):
        pytest.skip("temporary memory is the GPU's")
    command = [sys.executable, "-c", CALLS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def test_memory_is_kept_between_steps():
    assert page_faults("kept") < 1_000


@pytest.mark.control
def test_without_the_setting_memory_is_not_kept():
    assert page_faults("as it is") > 24_000
