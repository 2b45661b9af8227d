"""Measures the overhead of a step under plain jit, a mesh and pmap.

    JAX_NUM_CPU_DEVICES=8 python -m equivalence_tests.benchmark.step_cost  # results/step-cost.json

"empty" is a step that takes and returns the whole state of a training and only increments its step
count: the fixed cost of a call. "training" is a real step; on the CPU jit takes compiler options
that pmap cannot take, so the two run different programs. All variants take turns in one process.
"jit again" is a second plain jit, which shows the noise.
"""

import functools
import itertools
import sys
import time

import jax
import numpy as np

from equivalence_tests import results
from flax_resnet.commands import cli
from flax_resnet.config import ParallelConfig, TrainConfig
from flax_resnet.devices.parallel import Engine, look_up
from flax_resnet.models import create_model
from flax_resnet.training import steps
from flax_resnet.training.network import Network, Preprocess

BATCH, CLASSES, NUM_IMAGES = 16, 10, 64
STEPS = {"empty": 200, "training": 10}  # per turn
ROUNDS = 24  # turns of each variant


class Variant:
    """A training in progress; each call runs one turn of steps."""

    def __init__(self, kind: str, mode: str, devices: int):
        self.steps = STEPS[kind]
        parallel = "auto" if mode == "plain" else mode
        self.engine = Engine(ParallelConfig(parallel=parallel, devices=devices))
        config = cli.merge(TrainConfig(), {"batch_size": BATCH})
        model = create_model("basic_cnn", CLASSES, bn_axis_name=self.engine.axis_name)
        network = Network(model)
        step = (
            count_only
            if kind == "empty"
            else steps.make_train_step(
                network,
                config,
                Preprocess((0.4,) * 3, (0.2,) * 3),
                num_classes=CLASSES,
                steps_per_epoch=3,
                axis_name=self.engine.axis_name,
            )
        )
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (NUM_IMAGES, 8, 8, 3)).astype(np.uint8)
        labels = rng.integers(0, CLASSES, NUM_IMAGES).astype(np.int32)
        self.batch = [{"index": np.arange(BATCH, dtype=np.int32)}]
        self.state = self.engine.place_state(steps.make_state(network.initial, config))
        self.resident = self.engine.replicate({"image": images, "label": labels})
        self.place = self.engine.shard
        self.step = self.engine.compile_train(step, 1)
        if mode == "plain":
            self._leave_mesh(step)

    def _leave_mesh(self, step):
        self.state, self.resident = jax.device_put(
            jax.device_get((self.state, self.resident)), jax.devices()[0]
        )
        self.place = lambda batches: jax.device_put(batches[0])
        self.step = jax.jit(
            lambda state, resident, batch: step(state, look_up(resident, batch)),
            donate_argnums=0,
            compiler_options=self.engine._options,
        )

    def __call__(self) -> float:
        """Mean seconds of a step over one turn."""
        before = time.perf_counter()
        for _ in range(self.steps):
            self.state, metrics = self.step(self.state, self.resident, self.place(self.batch))
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - before) / self.steps


def count_only(state, batch):
    """A step that only increments the step count."""
    return state._replace(step=state.step + 1), {"loss": batch["label"].sum()}


def measure(variants: dict) -> dict:
    """{name: seconds per step of each turn}; the order of variants changes every round."""
    seconds = {name: [] for name in variants}
    for variant in variants.values():
        variant()  # compiles
    orders = itertools.cycle(itertools.permutations(variants))
    for order in itertools.islice(orders, ROUNDS):
        for name in order:
            seconds[name].append(variants[name]())
    return seconds


def summary(seconds: dict, reference: str) -> dict:
    """Quartiles of microseconds per step and of the ratio to the reference in the same round."""
    base, rows = np.array(seconds[reference]), {}
    for name, values in seconds.items():
        quartiles = functools.partial(np.quantile, q=[0.25, 0.5, 0.75])
        rows[name] = {
            "microseconds": [round(float(q) * 1e6, 1) for q in quartiles(np.array(values))],
            "ratio": [round(float(q), 4) for q in quartiles(np.array(values) / base)],
            "more_microseconds": round(float(np.median(values - base)) * 1e6, 1),
        }
    return rows


def main():
    count, measured = len(jax.devices()), {}
    for kind in STEPS:
        one = {
            "jit": Variant(kind, "plain", 1),
            "jit again": Variant(kind, "plain", 1),
            "mesh": Variant(kind, "jit", 1),
            "pmap": Variant(kind, "pmap", 1),
        }
        many = {"mesh": Variant(kind, "jit", count), "pmap": Variant(kind, "pmap", count)}
        measured[f"{kind}, one device"] = summary(measure(one), "jit")
        measured[f"{kind}, {count} devices"] = summary(measure(many), "mesh")
    method = (
        f"basic_cnn, batch {BATCH}; {ROUNDS} turns of {STEPS} steps each, in changing order;"
        " quartiles; more_microseconds is the median of the differences, turn by turn"
    )
    results.write("step-cost", {"method": method, **measured})
    for name, rows in measured.items():
        for variant, row in rows.items():
            print(name, variant, row)


if __name__ == "__main__":
    sys.exit(main())
