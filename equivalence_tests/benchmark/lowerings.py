"""Times a training step of JAX, and variants of it with one part computed another way.

    python -m equivalence_tests.benchmark.lowerings --arch resnet18 --stem imagenet --image-size 32
    python -m equivalence_tests.benchmark.lowerings --list

All ways take turns in one process. Memory is kept between steps, as `scripts/train.py` does, where
GLIBC_TUNABLES says so (`fresh_process.KEPT_MEMORY`). The JSON file also says how many digits of the
variance each way loses where the mean of a channel is large.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from equivalence_tests.benchmark import timed_jax, timing
from equivalence_tests.parity import inputs
from flax_resnet.commands import exits, output_files
from flax_resnet.devices.parallel import Engine
from flax_resnet.kernels import cpu_convolution, sliced_max_pool
from flax_resnet.kernels.cpu_sum import library_sum
from flax_resnet.models import create_from_config, layers
from flax_resnet.models.layers import BatchNorm
from flax_resnet.runs import environment
from flax_resnet.training import steps
from flax_resnet.training.network import Network


def window_max_pool(x, window, stride, padding):
    return layers.max_pool(x, window, stride, padding=padding, kernels="library")


def differentiated(how, lhs, rhs, gradient):
    return cpu_convolution._transposed(
        lambda lhs, rhs: cpu_convolution._plain(lhs, rhs, *how), lhs, rhs, gradient
    )


def normalize(x, mean, rstd, scale, bias, axis_name):
    del axis_name
    return layers._normalize(x, mean, rstd, scale, bias)


def not_stopped(values):
    return values


def two_pass(norm: BatchNorm, x):
    """The corrected algorithm: what the mean loses to rounding is the mean of the distances."""
    return _from_sums(x, layers._sums(layers._wide(x))[0] / np.prod(x.shape[:-1]))


def one_pass(norm: BatchNorm, x):
    return _from_sums(x, jnp.zeros_like(norm.mean[...]))


def shifted(norm: BatchNorm, x):
    return _from_sums(x, norm.mean[...])


def _from_sums(x, shift):
    """The variance as E[(x - shift)^2] - E[x - shift]^2, with both sums in one pass."""
    distance, count = layers._wide(x) - layers._per_channel(shift, x), np.prod(x.shape[:-1])
    mean, square = layers._sums(distance, jnp.square(distance)) / count
    return mean + shift, square - jnp.square(mean), count


def running(norm: BatchNorm, x):
    """Uses the running statistics; a step without those of the batch is only good for its time."""
    return norm.mean[...], norm.var[...], np.prod(x.shape[:-1])


STATISTICS = {
    "two-pass": two_pass,
    "one-pass": one_pass,
    "shifted": shifted,
    "running": running,
}
"""Other algorithms than distances from the mean of the first image, in one pass:
(module, `[B, ..., C]`) -> mean, var, count."""


def never(*_):
    return False


def no_options(*_):
    return {}


LIBRARY = {
    "library-convolution": [(cpu_convolution, "conv_general_dilated", lax.conv_general_dilated)],
    "library-products": [(cpu_convolution, "_product_is_faster", never)],
    "library-gradients": [(cpu_convolution, "_plain_gradients", differentiated)],
    "library-options": [(timed_jax, "compiler_options", no_options)],
    "library-max-pool": [(sliced_max_pool, "max_pool", window_max_pool)],
    "library-sums": [(layers, "sum_of_pixels", library_sum)],
    "maximum-relu": [(layers, "_computed_once", nnx.relu)],
    "relu-keeps-input": [(layers, "relu_of_sum", layers.relu)],
    "differentiated": [(layers, "_standardize", normalize), (lax, "stop_gradient", not_stopped)],
}
"""The operations of JAX and Flax in place of ours, and BatchNorm's gradient found operation by
operation: (owner, name, the other way)."""

WAYS = (
    {"as-is": []}
    | LIBRARY
    | {"library": LIBRARY["library-options"]}
    | {name: [(BatchNorm, "_batch_statistics", way)] for name, way in STATISTICS.items()}
)


class Step(NamedTuple):
    """A compiled step, its state and its batch."""

    compiled: jax.stages.Compiled
    state: list
    batch: tuple

    def run(self):
        state, metrics = self.compiled(self.state.pop(), *self.batch)
        self.state.append(state)
        return metrics


@contextlib.contextmanager
def computed(way: str):
    """Within this context, programs are traced with the parts of this way."""
    with contextlib.ExitStack() as stack:
        for place, name, other in WAYS[way]:
            stack.enter_context(mock.patch.object(place, name, other))
        jax.clear_caches()  # drops what was traced in another way
        yield


def make_model(job: timing.Job, way: str = "as-is") -> nnx.Module:
    config = timed_jax.make_config(job).model
    kernels = "library" if way == "library" else "auto"
    return create_from_config(dataclasses.replace(config, kernels=kernels), in_channels=3)


def compile_step(job: timing.Job, way: str, variables: nnx.State) -> Step:
    config = timed_jax.make_config(job)
    with computed(way):
        model = nnx.eval_shape(lambda: make_model(job, way))
        nnx.update(model, variables)
        network = Network(model)
        step = steps.make_train_step(
            network,
            config,
            inputs.AsGiven(),
            num_classes=job.num_classes,
            steps_per_epoch=1,
        )
        state = steps.make_state(network.initial, config)
        jitted, state, batch = timed_jax.place(job, Engine(config.parallel), step, state)
        return Step(jitted.lower(state, *batch).compile(), [state], batch)


def measure(programs: dict[str, Step], job: timing.Job) -> dict[str, list[float]]:
    """Times the ways in a drawn order: {way: seconds of a step of each block}."""
    seconds = {way: [] for way in programs}
    order = np.random.default_rng(0)
    for _ in range(job.blocks):
        for way in order.permutation(list(programs)).tolist():
            step = programs[way]
            finish = functools.partial(jax.block_until_ready, step.state)
            program = timing.Program(step.run, finish, list, job.steps_per_dispatch)
            seconds[way].append(timing.repeat(program, job.steps))
    return seconds


def summary(seconds: dict[str, list[float]], losses: dict[str, float], batch_size: int) -> dict:
    base = np.array(next(iter(seconds.values())))
    return {
        way: {
            "milliseconds": float(1e3 * np.median(values)),
            "images_per_second": float(batch_size / np.median(values)),
            "times_as_long": float(np.median(np.array(values) / base)),
            "quartiles": np.quantile(np.array(values) / base, (0.25, 0.75)).tolist(),
            "first_loss": losses[way],
        }
        for way, values in seconds.items()
    }


def digits_lost(way: str) -> dict[str, float]:
    """The largest relative error of a channel's variance: {size of the mean in deviations: error}.

    The keys with "+ running" have a running mean that is half a deviation away, as in the middle of
    a training; the others have 0, as at its start.
    """
    rng, found = np.random.default_rng(0), {}
    standard = rng.standard_normal((64, 8, 8, 16))
    with computed(way):
        norm = BatchNorm(16)
        for ratio, settled in itertools.product((0, 10, 1000, 100_000), (False, True)):
            x = (ratio + standard).astype(np.float32)
            norm.mean.set_value(jnp.full(16, ratio + 0.5 if settled else 0.0))
            var = norm._batch_statistics(jnp.asarray(x))[1]
            exact = x.astype(np.float64).var((0, 1, 2))
            name = f"{ratio} deviations{' + running' if settled else ''}"
            found[name] = float(np.max(np.abs(np.float64(var) / exact - 1)))
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help="ways to time besides as-is; default: all"
    )
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), help="default: that of the arch")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument(
        "--steps-per-dispatch", type=int, default=1, help="steps in a loop on the device"
    )
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print the names of the ways")
    args = parser.parse_args()
    if unknown := set(args.ways) - set(WAYS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; --list names them all")
    return args


def make_job(args) -> timing.Job:
    return timing.Job(
        arch=args.arch,
        stem=args.stem,
        num_classes=10,
        image_size=args.image_size,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=jax.default_backend(),
        framework="jax",
        variant="multi_step" if args.steps_per_dispatch > 1 else "jit",
        steps_per_dispatch=args.steps_per_dispatch,
        steps=args.steps,
        blocks=args.blocks,
    )


def main():
    args = parse()
    if args.list:
        return print("\n".join(WAYS))
    ways = ["as-is", *(args.ways or list(WAYS)[1:])]
    job = make_job(args)
    timed_jax.configure(job)
    variables, programs, losses = nnx.state(make_model(job)), {}, {}
    for way in dict.fromkeys(ways):
        programs[way] = compile_step(job, way, variables)
        losses[way] = float(np.ravel(programs[way].run()["loss"])[0])  # and warm
    rows = summary(measure(programs, job), losses, job.batch_size)
    lost = {way: digits_lost(way) for way in rows if way in {"as-is", *STATISTICS} - {"running"}}
    for way, row in rows.items():
        low, high = row["quartiles"]
        ratio = f"{row['times_as_long']:.3f} ({low:.3f} to {high:.3f})"
        print(f"{way}: {row['milliseconds']:.1f} ms, {ratio} times as long")
    if args.json:
        measured = {"command": exits.command_line(), "environment": environment.describe(1)}
        measured["glibc_tunables"] = os.environ.get("GLIBC_TUNABLES")
        measured |= {"rows": rows, "relative_error_of_variance": lost}
        output_files.write_json(args.json, measured)


if __name__ == "__main__":
    exits.run_command(main)
