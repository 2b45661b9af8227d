"""One device, a mesh and pmap give equal losses, gradients, statistics and weights in float64.

All random parts are on and the shards differ. So a statistic of one shard instead of the global
batch, or a draw that depends on the device, changes the result by far more than the bound.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from equivalence_tests.parity import inputs
from equivalence_tests.parity.tolerances import PARALLEL, largest_error
from flax_resnet.commands import cli
from flax_resnet.config import ParallelConfig, TrainConfig
from flax_resnet.devices.parallel import Engine
from flax_resnet.models.resnet import BasicBlock, ResNet
from flax_resnet.training import steps
from flax_resnet.training.network import Network, Preprocess

NUM_STEPS, BATCH = 5, 16
CONFIG = {
    "batch_size": str(BATCH),
    "augment": {
        "random_crop": "1", "horizontal_flip": ".5", "rotation": "20", "random_erasing": ".5",
        "mixup": ".3",
    },
    "optimizer": {"lr": ".01", "l1": "1e-5", "label_smoothing": ".1", "clip_norm": "1"},
    "model": {"dropout": ".4", "dtype": "float64"},
}  # fmt: skip
COLOURS = {"brightness": ".2", "contrast": ".2", "saturation": ".2", "hue": ".1"}
"""Settings that take the compiler as long as all others together; the slow tier adds them."""

WHOLE = 3
"""The depth of resnet20."""


def images_and_labels():
    rng = inputs.random_numbers()
    images = rng.integers(0, 256, (40, 10, 12, 3))
    images = images * np.linspace(0.1, 1, 40).reshape(-1, 1, 1, 1)  # shards differ in brightness
    return images.astype(np.uint8), rng.integers(0, 5, 40).astype(np.int32)


def run(
    mode: str,
    devices: int,
    depth: int = 1,
    *,
    steps_per_dispatch: int = 1,
    share_statistics=True,
    shard=False,
    group=None,
) -> dict:
    """{name: value} after five steps: every metric of every step and the whole state.

    Args:
      depth: blocks in each of the three stages; the whole network has `COLOURS` too.
      group: images that share BatchNorm's statistics; None: the whole batch.
    """
    config = cli.merge(TrainConfig(), CONFIG)
    config = cli.merge(config, {"model": {"batch_norm_images": group}} if group else {})
    config = cli.merge(config, {"augment": COLOURS} if depth == WHOLE else {})
    engine = Engine(ParallelConfig(parallel=mode, devices=devices, shard_parameters=shard))
    model = ResNet(
        BasicBlock, (depth,) * 3, 5, planes=16, stem="cifar", projection=False,
        dropout=config.model.dropout, param_dtype=np.float64, rngs=nnx.Rngs(0),
        bn_axis_name=engine.axis_name if share_statistics else None, batch_norm_images=group,
    )  # fmt: skip
    network = Network(model)
    train_step = steps.make_train_step(
        network, config, Preprocess((0.4,) * 3, (0.2,) * 3), num_classes=5,
        steps_per_epoch=2, axis_name=engine.axis_name, gather=engine.gather,
    )  # fmt: skip
    images, labels = images_and_labels()
    resident = engine.replicate({"image": images, "label": labels})
    state = engine.place_state(steps.make_state(network.initial, config))
    rng, values = inputs.random_numbers(1), {}
    step_fn = engine.compile_train(train_step, steps_per_dispatch)
    for first in range(0, NUM_STEPS, steps_per_dispatch):
        batches = [
            {"index": rng.permutation(40)[:BATCH].astype(np.int32)}
            for _ in range(steps_per_dispatch)
        ]
        state, metrics = step_fn(state, resident, engine.shard(batches))
        for name, value in engine.fetch_metrics(metrics).items():
            values |= {f"{name} {first + i}": v for i, v in enumerate(value)}
    state = jax.device_get(engine.single(state))
    return values | {jax.tree_util.keystr(p): v for p, v in jax.tree.flatten_with_path(state)[0]}


@functools.cache
def one_device(depth: int = 1, group: int | None = None) -> dict:
    return run("jit", 1, depth, group=group)


@pytest.mark.parametrize("depth", [1, pytest.param(WHOLE, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "devices, mode",
    [
        (2, "jit"),
        (8, "pmap"),
        *(pytest.param(*way, marks=pytest.mark.slow)
          for way in ((2, "pmap"), (4, "jit"), (4, "pmap"), (8, "jit"))),
    ],
)  # fmt: skip
def test_the_number_of_devices_does_not_matter(depth, mode, devices, x64):
    assert largest_error(run(mode, devices, depth), one_device(depth)) <= PARALLEL


def test_the_axis_of_pmap_is_removed_without_communication():
    """Eight CPU devices once hung while each array was sent to all devices."""
    engine = Engine(ParallelConfig(parallel="pmap", devices=8))
    tree = {"a": np.arange(6.0), "b": np.float32(7)}
    copies = engine.replicate(tree)
    assert copies["a"].shape == (8, 6)
    jax.tree.map(np.testing.assert_array_equal, engine.single(copies), tree)
    program = jax.jit(engine.single).lower(copies).compile().as_text()
    assert "num_partitions=8" in program and "all-" not in program


@pytest.mark.parametrize("devices", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_sharded_parameters_do_not_matter(devices, x64):
    assert largest_error(run("jit", devices, shard=True), one_device()) <= PARALLEL


@pytest.mark.parametrize(
    "group, mode, devices",
    [
        (4, "jit", 2),  # two groups a device
        pytest.param(4, "pmap", 4, marks=pytest.mark.slow),  # one
        pytest.param(4, "jit", 8, marks=pytest.mark.slow),  # one on two devices
        pytest.param(8, "pmap", 4, marks=pytest.mark.slow),
        pytest.param(2, "jit", 2, marks=pytest.mark.slow),
    ],
)
def test_groups_of_images_do_not_depend_on_the_devices(group, mode, devices, x64):
    assert largest_error(run(mode, devices, group=group), one_device(group=group)) <= PARALLEL


@pytest.mark.slow
def test_groups_of_images_may_lie_anywhere_with_sharded_parameters(x64):
    assert largest_error(run("jit", 8, shard=True, group=4), one_device(group=4)) <= PARALLEL


@pytest.mark.control
def test_statistics_of_groups_are_not_those_of_the_batch(x64):
    assert largest_error(one_device(group=4), one_device()) > 1e6 * PARALLEL


@pytest.mark.slow
def test_pmap_of_one_device_is_plain(x64):
    assert largest_error(run("pmap", 1), one_device()) <= PARALLEL


@pytest.mark.slow  # XLA:CPU runs convolutions inside a scan tens of times slower
@pytest.mark.parametrize("mode,devices", [("jit", 1), ("jit", 2), ("pmap", 2)])
def test_several_steps_a_dispatch_are_the_same_steps(mode, devices, x64):
    assert largest_error(run(mode, devices, steps_per_dispatch=5), one_device()) <= PARALLEL


@pytest.mark.control
def test_nan_exceeds_every_bound():
    good = {"a": np.ones(2), "b": np.ones(2)}
    for name in good:
        assert not largest_error(good | {name: np.full(2, np.nan)}, good) <= PARALLEL


@pytest.mark.control
@pytest.mark.parametrize("mode", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_statistics_of_a_shard_are_noticed(mode, x64):
    """Negative control: BatchNorm without the other devices."""
    assert largest_error(run(mode, 2, share_statistics=False), one_device()) > 1e6 * PARALLEL


@pytest.mark.control
def test_draws_that_depend_on_the_device_are_noticed(x64, monkeypatch):
    """Negative control: keys by position in the shard instead of by example."""
    original = jax.random.fold_in
    expected = one_device()

    def by_position(key, data):
        return original(key, data % 7)

    monkeypatch.setattr(jax.random, "fold_in", by_position)
    assert largest_error(run("jit", 2), expected) > 1e6 * PARALLEL
