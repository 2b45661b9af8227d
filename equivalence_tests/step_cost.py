"""What a step costs beyond its arithmetic: plain jit, a mesh, pmap, on a network of microseconds.

    JAX_NUM_CPU_DEVICES=8 python -m equivalence_tests.step_cost      # results/step-cost.json

All take turns in one process; "jit again" is plain jit a second time, and shows the noise.
"""

import functools
import itertools
import sys
import time

import jax
import numpy as np

from equivalence_tests import results
from flax_resnet import cli, steps
from flax_resnet.config import ParallelConfig, TrainConfig
from flax_resnet.models import create_model
from flax_resnet.parallel import Engine, look_up

BATCH, CLASSES, NUM_IMAGES = 16, 10, 64
STEPS, ROUNDS = 25, 60  # steps of a turn; turns of each variant


class Variant:
    """A training under way; each call is a turn."""

    def __init__(self, mode: str, devices: int):
        parallel = "auto" if mode == "plain" else mode
        self.engine = Engine(ParallelConfig(parallel=parallel, devices=devices))
        config = cli.merge(TrainConfig(), {"batch_size": BATCH})
        model = create_model("basic_cnn", CLASSES, bn_axis_name=self.engine.axis_name)
        network = steps.Network(model)
        step = steps.make_train_step(
            network,
            config,
            steps.Preprocess((0.4,) * 3, (0.2,) * 3),
            num_classes=CLASSES,
            steps_per_epoch=3,
            axis_name=self.engine.axis_name,
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
        """Seconds of a step, mean of a turn."""
        before = time.perf_counter()
        for _ in range(STEPS):
            self.state, metrics = self.step(self.state, self.resident, self.place(self.batch))
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - before) / STEPS


def measure(variants: dict) -> dict:
    """{name: seconds of each turn}, the order of the variants changed from round to round."""
    seconds = {name: [] for name in variants}
    for variant in variants.values():
        variant()  # compiles
    orders = itertools.cycle(itertools.permutations(variants))
    for order in itertools.islice(orders, ROUNDS):
        for name in order:
            seconds[name].append(variants[name]())
    return seconds


def summary(seconds: dict, reference: str) -> dict:
    """Microseconds of a step with quartiles, and the ratio to the reference, round by round."""
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
    one = {
        "jit": Variant("plain", 1),
        "jit again": Variant("plain", 1),
        "mesh": Variant("jit", 1),
        "pmap": Variant("pmap", 1),
    }
    measured = {"one_device": summary(measure(one), "jit")}
    count = len(jax.devices())
    if count > 1:
        many = {"mesh": Variant("jit", count), "pmap": Variant("pmap", count)}
        measured[f"{count}_devices"] = summary(measure(many), "mesh")
    method = f"{ROUNDS} turns of {STEPS} steps each, in changing order; quartiles; batch {BATCH}"
    results.write("step-cost", {"method": method, **measured})
    for name, rows in measured.items():
        for variant, row in rows.items():
            print(name, variant, row)


if __name__ == "__main__":
    sys.exit(main())
