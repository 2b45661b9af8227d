"""Times the programs that `flax-resnet plan` bounds, on the card at hand, beside their bounds.

    python -m equivalence_tests.benchmark.measured               # on an H200: measured-h200.json
    python -m equivalence_tests.benchmark.measured --only resnet50-bfloat16 --again

Each program is compiled twice: for the target, as `plan` does without a card, and for the card
itself, where the compiler also chooses kernels by timing them. The second is run. Its bound is that
of its own bytes and FLOPs on the data sheet.
"""

import argparse
import statistics
from typing import NamedTuple

import jax
import numpy as np

from equivalence_tests import results
from equivalence_tests.benchmark import timing
from equivalence_tests.studies import step_bytes
from flax_resnet import machine
from flax_resnet.commands import exits
from flax_resnet.devices import targets
from flax_resnet.errors import InputError
from flax_resnet.training import ahead, steps

WARM_UP, BLOCKS, STEPS = 10, 5, 20
"""Steps before the first block; blocks, whose median counts; steps of a block, which waits for the
device once, at its end."""


class Case(NamedTuple):
    """A program by its network, images and types."""

    arch: str
    stem: str | None
    num_classes: int
    image_size: int
    batch_size: int
    dtype: str
    evaluation: bool = False


_SMALL, _LARGE = (10, 32), (1000, 224)
CASES = {
    f"{arch}-{dtype}{'-evaluation' * evaluation}": Case(
        arch, stem, *data, images, dtype, evaluation
    )
    for dtype in ("bfloat16", "float32")
    for arch, stem, data, images, evaluation in (
        ("resnet50", "imagenet", _LARGE, 256, False),
        ("resnet18", "cifar", _SMALL, 1024, False),
        ("resnet20", None, _SMALL, 1024, False),
        ("resnet101", "imagenet", _LARGE, 128, False),
        ("resnet50", "imagenet", _LARGE, 256, True),
    )
}


def plan(case: Case, target: targets.Target, devices: list | None) -> ahead.Plan:
    """The plan of a case for its target, or for devices of it that are at hand."""
    *network, evaluation = case
    config, data = step_bytes.step_of(*network)
    return ahead.Plan(config, data, target, evaluation=evaluation, devices=devices)


def stepper(plan: ahead.Plan, executable):
    """A function that starts one step on random images, and one that waits for all of them."""
    rng, size = np.random.default_rng(0), plan.batch_size
    batch = {
        "image": rng.integers(0, 256, (size, *plan.data.image_shape), np.uint8),
        "label": rng.integers(0, plan.config.model.num_classes, size, np.int32),
    }
    engine, last = plan.engine, {}
    if plan.evaluation:
        variables = engine.replicate(plan.network.initial)
        batch = engine.shard_eval(batch | {"mask": np.ones(size, bool)})

        def step():
            last["result"] = executable(variables, batch)
    else:
        last["result"] = (engine.place_state(steps.make_state(plan.network.initial, plan.config)),)
        index = np.arange(size, dtype=np.int32)
        batches = engine.shard([batch | {"index": index}] * plan.num_steps)

        def step():
            last["result"] = executable(last["result"][0], {}, batches)

    return step, lambda: jax.block_until_ready(last["result"])


def seconds_of_a_step(step, wait, num_steps: int) -> list[float]:
    """Seconds of a step in each block."""
    program = timing.Program(step, wait, list, num_steps)
    timing.repeat(program, WARM_UP * num_steps)
    return [timing.repeat(program, STEPS * num_steps) for _ in range(BLOCKS)]


def row(case: Case, target: targets.Target) -> dict:
    """Compile and time one program."""
    planned = plan(case, target, None).compile()
    here = plan(case, target, jax.devices()[:1])
    made = here.compile()
    blocks = seconds_of_a_step(*stepper(here, made.executable), here.num_steps)
    median = statistics.median(blocks)
    return case._asdict() | {
        "seconds_per_step": median,
        "quickest_and_slowest_block": [min(blocks), max(blocks)],
        "images_per_second": case.batch_size / median,
        "bound_seconds": made.bound_seconds,
        "measured_over_bound": median / made.bound_seconds,
        "bytes": made.bytes,
        "bytes_per_second": made.bytes / median,
        "flops": made.flops,
        "peak_bytes": made.peak_bytes,
        "planned": {
            "bound_seconds": planned.bound_seconds,
            "bytes": planned.bytes,
            "peak_bytes": planned.peak_bytes,
        },
        "revision": machine.revision(),
    }


def card_of(device_kind: str) -> str:
    """The name of a card as `plan --target` has it, from that which JAX has: "NVIDIA H200".

    Raises:
      InputError: `plan` does not know the card.
    """
    for name in targets.CARDS:
        if name in device_kind.lower().split():
            return name
    raise InputError(f"{device_kind} is none of {', '.join(targets.CARDS)}: name the card")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("card", nargs="?", help="as `plan --target` names it; default: by its name")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    args = parser.parse_args()
    here = jax.devices()[0]
    target = targets.parse(args.card or card_of(here.device_kind))
    if here.platform != {"cuda": "gpu"}.get(target.card.platform, target.card.platform):
        raise InputError(f"there is no {target.name} here: JAX sees {here.device_kind}")
    return args, target


def main():
    args, target = parse()
    name = f"measured-{target.name}"
    try:
        rows = results.read(name)["programs"]
    except FileNotFoundError:
        rows = {}
    for title in args.only:
        if title not in rows or args.again:
            rows[title] = row(CASES[title], target)
            results.write(name, {"card": target.card.source, "programs": rows})
            share = rows[title]["measured_over_bound"]
            print(f"{title}: {rows[title]['images_per_second']:,.0f} images/s, {share:.2f} x bound")


if __name__ == "__main__":
    exits.run_command(main)
