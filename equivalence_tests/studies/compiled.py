"""Compiles the training step of every network for an H100 and a TPU v5e and checks each program.

    nice python -m equivalence_tests.studies.compiled            # results/compiled.json
    nice python -m equivalence_tests.studies.compiled --only resnet18 --again

Nothing runs. A program takes 10 seconds to minutes to compile and is written as soon as it is
there; a second call goes on with those that are missing.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator

from flax import nnx

from equivalence_tests import results
from flax_resnet import create_model, list_models, machine
from flax_resnet.commands import cli, plan
from flax_resnet.config import TrainConfig
from flax_resnet.devices import program, targets
from flax_resnet.training import ahead

NAME = "compiled"
IMAGES = {"h100": 96, "v5e": 24}
"""{target: images of a step}: no layer has as many channels, which tells activations from
kernels."""

DTYPES = ("bfloat16", "float32")
PRODUCTS = {"bfloat16": {"bf16"}, "float32": {"f32"}}
"""{computation of a config: types of the operands of its convolutions}"""

ROUNDED = {"bf16", "f32"}
"""The types on a TPU in float32: it multiplies what JAX rounds to bfloat16 by default, and XLA may
round a tensor where it is written."""

FOREIGN = r"callback|\bf64\[|infeed|outfeed|send\(|recv\("
"""Operations that stand in no program: calls of the host, and float64."""

UNORDERED = r" (scatter|select-and-scatter)\("
"""Operations that add in an order which changes from run to run on a GPU."""


def convolutions_of(arch: str) -> int:
    """Number of the convolutions of a network."""
    model = nnx.eval_shape(lambda: create_model(arch))
    return sum(isinstance(m, nnx.Conv) for _, m in nnx.iter_modules(model))


def convolutions(made: ahead.Compiled) -> Counter:
    """{pass: number} of the convolutions of a compiled step."""
    return Counter(k.phase for k in made.kernels if k.kind == "convolution")


def product_types(made: ahead.Compiled) -> set[str]:
    """The types of the operands of all convolutions."""
    return {k.dtype for k in made.kernels if k.kind == "convolution"}


def wide_activations(made: ahead.Compiled) -> list[str]:
    """Results of kernels in the device's memory and in float32 that have as many rows as a device
    has images, four axes and more channels than an image."""
    read = program.parse(made.text)
    rows = made.batch_size // made.num_devices
    return [
        i.name
        for i in read.computations[read.entry].values()
        for dtype, shape, outside in program.arrays(i.type)
        if outside and dtype == "f32" and len(shape) == 4 and shape[0] == rows
        if min(shape[1], shape[3]) > 3
    ]


def faults(made: ahead.Compiled, arch: str, dtype: str) -> Iterator[str]:
    """Yields a line for each promise that a step on one device, with `deterministic`, breaks.

    Backward there are two convolutions for each forward, but for that of the images, whose gradient
    nobody needs.
    """
    count = convolutions_of(arch)
    if (found := convolutions(made)) != {"forward": count, "backward": 2 * count - 1}:
        yield f"{dict(found)} convolutions of a network with {count}"
    on_tpu = made.target.card.platform == "tpu"
    allowed = ROUNDED if on_tpu and dtype == "float32" else PRODUCTS[dtype]
    if (types := product_types(made)) - allowed:
        yield f"convolutions of {', '.join(sorted(types))}"
    if foreign := re.search(FOREIGN, made.text):
        yield f"{foreign[0]} in the program"
    if dtype == "bfloat16" and (wide := wide_activations(made)):
        yield f"{len(wide)} activations written in float32: {', '.join(wide[:3])}"
    if not on_tpu and (unordered := re.search(UNORDERED, made.text)):
        yield f"{unordered[1]} in the program"
    if exchanged := program.collectives(made.kernels):
        yield f"{exchanged[0]['kind']} on one device"


def step(arch: str, target: str, dtype: str) -> ahead.Compiled:
    """The compiled step of a training at the sizes on which a network was published."""
    values = {"batch_size": IMAGES[target], "deterministic": True}
    values["model"] = {"arch": arch, "dtype": dtype}
    config, data = plan.of_flags(cli.merge(TrainConfig(), values))
    return ahead.Plan(config, data, targets.parse(target)).compile()


def row(arch: str, target: str, dtype: str) -> dict:
    """The figures of a program, and what is wrong in it."""
    made = step(arch, target, dtype)
    found = {"arch": arch, "target": target, "dtype": dtype, "batch_size": IMAGES[target]}
    if made is None:
        return found | {"wrong": ["the compiler refuses it for want of memory"]}
    return found | {
        "wrong": list(faults(made, arch, dtype)),
        "convolutions": dict(convolutions(made)),
        "kernels": sum(k.times for k in made.kernels),
        "peak_bytes": made.peak_bytes,
        "bytes_per_step": made.bytes,
        "flops_per_step": made.flops,
        "compile_seconds": round(made.seconds, 1),
        "revision": machine.revision(),
    }


def write(rows: list[dict]):
    """Write the results file."""
    order = {arch: place for place, arch in enumerate(list_models())}
    rows = sorted(rows, key=lambda row: (order[row["arch"]], row["target"], row["dtype"]))
    results.write(NAME, {"right": sum(not row["wrong"] for row in rows), "rows": rows})


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ARCH", default=list_models())
    parser.add_argument("--targets", nargs="+", metavar="TARGET", default=list(IMAGES))
    parser.add_argument("--again", action="store_true", help="compile what is there already, too")
    return parser.parse_args()


def main() -> int:
    args = parse()
    there = results.known(NAME)
    rows = {(row["arch"], row["target"], row["dtype"]): row for row in there}
    for key in [(a, t, d) for t in args.targets for a in args.only for d in DTYPES]:
        if args.again or key not in rows:
            rows[key] = row(*key)
            write(list(rows.values()))
            print(rows[key], flush=True)
    return int(any(row["wrong"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
