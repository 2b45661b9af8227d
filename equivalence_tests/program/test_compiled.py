"""Compiled steps on several devices contain exactly the collectives that they need."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from equivalence_tests import results
from equivalence_tests.benchmark import scaling
from equivalence_tests.parity import inputs
from flax_resnet.commands import cli
from flax_resnet.config import ParallelConfig, TrainConfig
from flax_resnet.devices import targets
from flax_resnet.devices.parallel import Engine, look_up
from flax_resnet.models import create_model
from flax_resnet.models.layers import BatchNorm
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.training import steps
from flax_resnet.training.network import Network, Preprocess, predict_logits

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
)  # fmt: skip
NUM_IMAGES, BATCH, CLASSES = 48, 16, 5


class Program:
    """Training and evaluation steps on tiny images, with their arguments."""

    def __init__(self, arch: str, parallel: ParallelConfig, **augment):
        config = cli.merge(TrainConfig(), {"batch_size": BATCH, "augment": augment})
        self.engine = Engine(parallel)
        model = create_model(arch, CLASSES, dropout=0.1, bn_axis_name=self.engine.axis_name)
        self.batch_norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
        network = Network(model)
        preprocess = Preprocess((0.4,) * 3, (0.2,) * 3)
        self.train_step = steps.make_train_step(
            network, config, preprocess, num_classes=CLASSES, steps_per_epoch=3,
            axis_name=self.engine.axis_name, gather=self.engine.gather,
        )  # fmt: skip
        self.eval_step = steps.make_eval_step(network, preprocess, num_classes=CLASSES)
        self.network, self.config = network, config

    def arguments(self):
        rng = inputs.random_numbers()
        images = rng.integers(0, 256, (NUM_IMAGES, 8, 8, 3)).astype(np.uint8)
        labels = rng.integers(0, CLASSES, NUM_IMAGES).astype(np.int32)
        state = self.engine.place_state(steps.make_state(self.network.initial, self.config))
        return state, self.engine.replicate({"image": images, "label": labels}), self.batch(0)

    def batch(self, number):
        order = np.random.default_rng(number).permutation(NUM_IMAGES)[:BATCH]
        return self.engine.shard([{"index": order.astype(np.int32)}])

    def training(self) -> str:
        """HLO of a training step."""
        step = self.engine.compile_train(self.train_step, 1)
        return step.lower(*self.arguments()).compile().as_text()

    def evaluation(self) -> str:
        images, mask = np.zeros((BATCH, 8, 8, 3), np.uint8), np.ones(BATCH, bool)
        batch = {"image": images, "label": np.zeros(BATCH, np.int32), "mask": mask}
        step = self.engine.compile_eval(self.eval_step)
        variables = self.engine.replicate(self.network.initial)
        return step.lower(variables, self.engine.shard_eval(batch)).compile().as_text()


def opcodes(hlo: str) -> list[str]:
    """The operations of a program, in order."""
    return re.findall(r"^\s*(?:ROOT )?%?\S+ = .*?[\])}] ([a-z][\w-]*)\(", hlo, re.MULTILINE)


def collectives(hlo: str) -> dict:
    """{collective operation: number of uses}."""
    names = (name.removesuffix("-start") for name in opcodes(hlo))
    return Counter(name for name in names if name in COLLECTIVES)


def bytes_all_reduced(hlo: str) -> int:
    """Bytes of the float32 numbers in all-reduces."""
    lines = [line.split(" all-reduce(")[0] for line in hlo.splitlines() if " all-reduce(" in line]
    shapes = [shape for line in lines for shape in re.findall(r"f32\[([\d,]*)\]", line)]
    return 4 * sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


@pytest.mark.parametrize("arch", ["basic_cnn", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_a_step_exchanges_what_it_needs_and_nothing_else(arch):
    """All-reduces: two forward and one backward per BatchNorm, and one of gradients and metrics.

    Mixup needs two permutes, for the images and targets of the neighbour.
    """
    program = Program(arch, ParallelConfig(devices=8), horizontal_flip=0.5, mixup=0.2)
    hlo, layers = program.training(), program.batch_norms
    assert collectives(hlo) == {"all-reduce": 3 * len(layers) + 1, "collective-permute": 2}
    channels = sum(layer.scale[...].size for layer in layers)
    parameters = sum(p.size for p in jax.tree.leaves(program.network.initial.params))
    # Each channel of a BatchNorm needs three sums forward; the two sums backward are the gradients
    # of its two parameters.
    assert bytes_all_reduced(hlo) == 4 * (3 * channels + parameters + 2)


def test_the_seconds_of_an_exchange_follow_from_the_assumptions():
    """On two hosts of eight GPUs, counted by hand."""
    eight, two_hosts = (targets.parse(word) for word in ("h100:8", "h100:2x8"))
    assert scaling.latency(eight) == pytest.approx(10e-6 + 3 * 2e-6)
    assert scaling.latency(two_hosts) == pytest.approx(10e-6 + 3 * 2e-6 + 8e-6)
    inside = 2 * 7 / 8 / 450e9
    assert scaling.seconds_of_a_byte(eight) == pytest.approx(inside)
    assert scaling.seconds_of_a_byte(two_hosts) == pytest.approx(inside + 1 / (8 * 50e9))
    assert scaling.seconds_of_a_byte(targets.parse("h100")) == 0


def test_the_recorded_seconds_are_those_of_the_assumptions():
    document = results.read("scaling")
    assert document["assumptions"] == scaling.ASSUMPTIONS and document["rows"]
    for row in document["rows"]:
        assert row | scaling.derived(row) == row


def test_sharded_parameters_are_gathered_once():
    program = Program("basic_cnn", ParallelConfig(devices=8, shard_parameters=True))
    like = program.engine.state_like(program.network.initial.params)
    parts = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(like))
    hlo = program.training()
    found = collectives(hlo)
    assert found.keys() == {"all-reduce", "all-gather"} and found["all-gather"] == parts > 0
    parameters = sum(p.size for p in jax.tree.leaves(program.network.initial.params))
    assert 0 <= bytes_all_reduced(hlo) - 4 * (parameters + 2) <= 4 * parts  # and norms of parts


def test_an_evaluation_exchanges_its_sums_alone():
    """One all-reduce for floats (loss) and one for integers (counts, confusion matrix)."""
    program = Program("basic_cnn", ParallelConfig(devices=8))
    assert collectives(program.evaluation()) == {"all-reduce": 2}


def test_a_mesh_of_one_is_plain_jit():
    """Both programs have the same operations, and no collectives."""
    program = Program("basic_cnn", ParallelConfig(devices=1), mixup=0.2)
    plain = jax.jit(
        lambda state, resident, batch: program.train_step(state, look_up(resident, batch)),
        donate_argnums=0,
        compiler_options=program.engine._options,
    )
    arguments = jax.device_get(program.arguments())
    alone, mesh = opcodes(plain.lower(*arguments).compile().as_text()), program.training()
    assert opcodes(mesh) == alone and len(alone) > 100
    assert not collectives(mesh) and not collectives(program.evaluation())


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(devices=1),
        ParallelConfig(devices=4, shard_parameters=True),
        pytest.param(ParallelConfig(devices=4, parallel="pmap"), marks=pytest.mark.slow),
    ],
    ids=["one", "sharded", "pmap"],
)
def test_nothing_is_compiled_after_the_first_step(parallel):
    program, compiled = Program("basic_cnn", parallel), []

    def note(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    state, resident, batch = program.arguments()
    step = program.engine.compile_train(program.train_step, 1)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        state, metrics = step(state, resident, batch)
        program.engine.fetch_metrics(metrics)
        assert compiled  # the listener works
        compiled.clear()
        for number in range(1, 6):
            state, metrics = step(state, resident, program.batch(number))
            program.engine.fetch_metrics(metrics)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.control
def test_an_exchange_too_many_is_counted():
    """Negative control: the top five by sorting gathers all logits."""
    program = Program("basic_cnn", ParallelConfig(devices=8))
    plain = program.eval_step

    def with_top_k(variables, batch):
        logits = predict_logits(
            program.network, Preprocess((0.4,) * 3, (0.2,) * 3), variables, batch["image"]
        )
        return plain(variables, batch) | {"top": jax.lax.top_k(logits, 2)[1].sum()}

    program.eval_step = with_top_k
    assert "all-gather" in collectives(program.evaluation())


def test_a_checkpoint_loads_on_another_number_of_devices(tmp_path):
    """Replicated or sharded, from one device to eight and back, the bits are the same."""
    layouts = [(1, False), (8, False), (8, True)]
    engines = [Engine(ParallelConfig(devices=n, shard_parameters=s)) for n, s in layouts]
    network = Network(create_model("basic_cnn", CLASSES))
    state = steps.make_state(network.initial, TrainConfig())
    for number, writer in enumerate(engines):
        checkpoints = Checkpoints(tmp_path / str(number))
        checkpoints.save(1, writer.place_state(state), {}, improvement=False)
        for reader in engines:
            like = reader.state_like(state)
            restored = checkpoints.restore(1, like)
            for got, wanted, place in zip(
                *map(jax.tree.leaves, (restored, state, like)), strict=True
            ):
                assert got.sharding.is_equivalent_to(place.sharding, got.ndim)
                np.testing.assert_array_equal(got, wanted)
        checkpoints.close()
