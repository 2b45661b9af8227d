"""A training step on 1 to 1,024 GPUs and 1 to 256 TPU chips, as XLA compiles it for them.

    nice python -m equivalence_tests.benchmark.scaling       # results/scaling.json and .png
    nice python -m equivalence_tests.benchmark.scaling --only h100:8 --again

Programs, memory, bytes and collectives are compiled facts. Seconds of an exchange follow from the
assumptions below; no program has run. Each program takes minutes to compile and is written as soon
as it is there; a second call goes on with those that are missing.
"""

import argparse
import sys
from collections.abc import Iterator

from equivalence_tests import results
from equivalence_tests.benchmark import charts
from equivalence_tests.studies import step_bytes
from flax_resnet import machine
from flax_resnet.commands import cli
from flax_resnet.devices import program, targets
from flax_resnet.training import ahead

ARCH, SIZE, CLASSES = "resnet50", 224, 1000
IMAGES = 128  # on each device
TARGETS = ("h100", "h100:8", "h100:128x8", "h100:8x8", "v5e", "v5e:2x2", "v5e:16x16")
STATISTICS = {"device": "the images of each device", "batch": "the whole batch"}
"""BatchNorm's statistics: those of groups of as many images as a device has, or the default."""

LINKS = {
    "nvlink": (450e9, 2e-6),
    "infiniband": (50e9, 8e-6),
    "ici": (100e9, 1e-6),
}
"""{link: (bytes a second in each direction of a device, seconds of every doubling of devices)}"""

START = 10e-6  # seconds
ASSUMPTIONS = {
    "status": "bytes, memory and collectives are those of compiled programs; the seconds of an"
    " exchange follow from the assumptions here, and nothing was run",
    "scaling": f"weak: {ARCH}, {SIZE} pixels, {IMAGES} images a device however many there are,"
    " bfloat16 computation",
    "bound": "no kernel is faster than its bytes over the bandwidth and its FLOPs over the peak of"
    " the data sheet. Real steps take longer, which makes the share of the exchange smaller",
    "nvlink": "450 GB/s in each direction, half of the 900 GB/s of NVIDIA's H100 data sheet",
    "infiniband": "50 GB/s in each direction: one NDR adapter of 400 Gb/s for every GPU, as in"
    " NVIDIA's DGX H100 data sheet",
    "ici": "100 GB/s in each direction, half of the 1,600 Gb/s of Google Cloud's page on TPU v5e",
    "hosts": "GPUs in hosts of 8: reduce-scatter inside, all-reduce of the parts between hosts,"
    " all-gather inside",
    "all_reduce": "a ring at full bandwidth: 2 (n - 1) / n times the bytes",
    "latency_seconds": "of every all-reduce 10e-6 to start, and for every doubling of the devices"
    " 2e-6 over NVLink, 8e-6 over InfiniBand, 1e-6 between TPU chips; assumed without a source",
    "overlap": "none, though a compiler may hide the exchange of gradients behind the backward"
    " pass; BatchNorm's sums have to be there before the next layer",
    "left_out": "reading images, evaluation, checkpoints, processes that wait for the slowest",
}


def row(target: targets.Target, statistics: str) -> dict:
    """Compile the step for a target."""
    images = IMAGES * target.num_devices
    config, data = step_bytes.step_of(ARCH, "imagenet", CLASSES, SIZE, images)
    if statistics == "device":
        config = cli.merge(config, {"model": {"batch_norm_images": IMAGES}})
    made = ahead.Plan(config, data, target).compile()
    alone = [k for k in made.kernels if k.kind not in program.COLLECTIVES]
    found = {
        "target": target.name,
        "devices": target.num_devices,
        "statistics": statistics,
        "argument_bytes": made.argument_bytes,
        "temporary_bytes": made.temporary_bytes,
        "bytes_per_step": made.bytes,
        "collectives": program.collectives(made.kernels),
        "bound_seconds_without_exchange": sum(k.times * ahead.bound(k, target.card) for k in alone),
        "compile_seconds": round(made.seconds),
        "revision": machine.revision(),
    }
    return found | derived(found)


def derived(found: dict) -> dict:
    """Seconds that follow from a compiled row by `ASSUMPTIONS`."""
    target = targets.parse(found["target"])
    seconds = sum(
        each["count"] * latency(target) + each["bytes"] * seconds_of_a_byte(target)
        for each in found["collectives"]
    )
    alone = found["bound_seconds_without_exchange"]
    return {
        "exchange_seconds": seconds,
        "share_of_computation": round(alone / (alone + seconds), 4),
    }


def _rings(target: targets.Target) -> Iterator[tuple[int, float, float]]:
    """(devices, bytes a second, seconds of a doubling) of each ring of an all-reduce. The second
    one, between hosts, has a part of the bytes for each device of a host."""
    if target.card.platform == "tpu":
        yield target.num_devices, *LINKS["ici"]
        return
    hosts, inside = target.shape
    bandwidth, doubling = LINKS["infiniband"]
    yield inside, *LINKS["nvlink"]
    yield hosts, bandwidth * inside, doubling


def latency(target: targets.Target) -> float:
    """Seconds of an all-reduce of nothing."""
    hops = sum((count - 1).bit_length() * doubling for count, _, doubling in _rings(target))
    return START + hops


def seconds_of_a_byte(target: targets.Target) -> float:
    """Seconds that every byte of an all-reduce adds."""
    return sum(2 * (count - 1) / count / bandwidth for count, bandwidth, _ in _rings(target))


def wanted(only: list[str]) -> Iterator[tuple[targets.Target, str]]:
    """The programs to compile; one device has one kind of statistics."""
    for name in only:
        target = targets.parse(name)
        for statistics in ("batch",) if target.num_devices == 1 else STATISTICS:
            yield target, statistics


def write(rows: list[dict]):
    """Write the results file and its picture."""
    rows = sorted(rows, key=lambda row: (row["target"].partition(":")[0], row["devices"]))
    results.write("scaling", {"assumptions": ASSUMPTIONS, "rows": rows})
    charts.scaling(results.FOLDER / "scaling.png", rows, STATISTICS)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = {"nargs": "+", "metavar": "TARGET", "default": TARGETS}
    parser.add_argument("--only", help="only these targets", **how)
    parser.add_argument("--again", action="store_true", help="compile what is there already, too")
    return parser.parse_args()


def main():
    args = parse()
    rows = {(row["target"], row["statistics"]): row for row in results.read("scaling")["rows"]}
    for target, statistics in wanted(args.only):
        key = target.name, statistics
        if args.again or key not in rows:
            rows[key] = row(target, statistics)
            write(list(rows.values()))
            print(rows[key], flush=True)


if __name__ == "__main__":
    sys.exit(main())
