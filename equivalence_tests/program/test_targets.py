"""Targets by name, what they refuse, and the search for the largest batch that fits."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

from flax_resnet.commands import cli
from flax_resnet.config import TrainConfig
from flax_resnet.devices import targets
from flax_resnet.errors import InputError
from flax_resnet.training import ahead

DATA = ahead.Data((32, 32, 3), resident=0)


@pytest.mark.parametrize(
    ("word", "count", "platform"),
    [("h100", 1, "gpu"), ("h100:8", 8, "gpu"), ("b200:128x8", 1024, "gpu")],
)
def test_a_target_has_the_devices_of_its_name(word, count, platform):
    devices = targets.devices(targets.parse(word))
    assert len(devices) == count and {d.platform for d in devices} == {platform}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("h10", "did you mean 'h100'"),
        ("", "valid: "),
        ("h100:9", "at most 8 GPUs"),
        ("h100:0", "is no shape"),
        ("h100:8x", "is no shape"),
        ("h100:2x2x2", "hosts x GPUs"),
        ("v5e:2x2x1", "2 axes"),
        ("v5p:2x2", "3 axes"),
    ],
)
def test_a_target_that_does_not_exist_is_named(word, says):
    with pytest.raises(InputError, match=re.escape(says)) as fault:
        targets.parse(word)
    assert repr(word) in str(fault.value)


def test_a_compiler_that_is_not_installed_is_named_with_its_extra():
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(InputError, match=r"pip install '\.\[tpu\]'"),
    ):
        targets.devices(targets.parse("v5e"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"batch_size": 8190}, "cannot be divided among 4 devices"),
        (
            {"batch_size": 24, "model": {"arch": "resnet20", "batch_norm_images": 4}},
            "`batch_norm_images` 4: 4 devices with 6 images each",
        ),
        ({"parallel": {"parallel": "pmap"}}, "pmap"),
        ({"parallel": {"devices": 5}}, "h100:4 has 4"),
    ],
)
def test_what_a_target_cannot_run_is_refused(values, says):
    config = {"model": {"arch": "basic_cnn"}, "data": {"image_size": 32}} | values
    config = cli.merge(cli.merge(TrainConfig(), {"model": {"num_classes": 10}}), config)
    with pytest.raises(InputError, match=re.escape(says)):
        ahead.Plan(config, DATA, targets.parse("h100:4")).compile()


class FakePlan:
    """A plan whose programs take `used(batch)` bytes; beyond `refused` the compiler gives none."""

    def __init__(self, used, *, devices, batch_size, refused=math.inf, groups=1):
        self.used, self.batch_size, self.refused, self.compiled = used, batch_size, refused, 0
        self.shared_by = devices * groups
        self.engine = SimpleNamespace(devices=range(devices))
        self.target = targets.parse("h100")

    def can_share(self, batch_size):
        return batch_size % self.shared_by == 0

    def compile(self, batch_size):
        self.compiled += 1
        assert batch_size > 0 and self.can_share(batch_size)
        peak, room = self.used(batch_size), self.target.card.memory_bytes
        made = dict(batch_size=batch_size, peak_bytes=peak, fits=peak <= room, target=self.target)
        return None if peak > self.refused else SimpleNamespace(**made, argument_bytes=1e8)


@pytest.mark.parametrize("refused", [math.inf, 84e9])
@pytest.mark.parametrize("batch_size", [8, 1024, 2**20])
@pytest.mark.parametrize("curve", [0, 2e3])
def test_the_largest_batch_is_found_to_three_percent(refused, batch_size, curve):
    fake = FakePlan(
        lambda b: 1e8 + 4e7 * b + curve * b * b, devices=8, batch_size=batch_size, refused=refused
    )
    found = ahead.largest_batch(fake, fake.compile(batch_size))
    memory = fake.target.card.memory_bytes
    assert fake.used(found) <= memory < fake.used(math.ceil(1.031 * found) + 8)
    assert fake.compiled <= 30  # of 131,072 batches that eight devices can share


@pytest.mark.parametrize("largest", [0.5, 3, 300.7])
def test_the_largest_batch_has_whole_groups_on_every_device(largest):
    memory = targets.parse("h100").card.memory_bytes
    used = memory / (largest * 512)
    fake = FakePlan(lambda b: used * b, devices=8, batch_size=2048, groups=64)
    found = ahead.largest_batch(fake, fake.compile(2048)) or 0
    assert found % 512 == 0 and found <= largest * 512 < 1.031 * found + 512


def test_no_batch_fits_where_the_parameters_alone_do_not():
    fake = FakePlan(lambda b: 9e10 + b, devices=1, batch_size=16)
    assert ahead.largest_batch(fake, fake.compile(16)) is None


def test_the_compiler_of_gpus_leaves_a_machine_without_a_driver_in_peace():
    """Without the setting that the package makes, JAX ends in a segmentation fault here."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    program = "import flax_resnet, jax; print(jax.devices()[0].platform)"
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("cpu", "gpu", "tpu")


def test_a_machine_without_a_tpu_is_not_warned_of_its_compiler():
    """libtpu, once it is installed, is loaded by every program of JAX."""
    pytest.importorskip("libtpu")
    variables = {"JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"}
    plain = {name: value for name, value in os.environ.items() if name not in variables}
    code = "import flax_resnet, jax; print(jax.default_backend())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", done.stderr
