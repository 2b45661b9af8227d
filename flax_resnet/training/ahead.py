"""Compiles the steps of a training for devices that are not here, and measures the programs.

Nothing runs: a bound is what the program cannot beat on the figures of a data sheet, and no
prediction of its speed.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resnet.config import TrainConfig
from flax_resnet.devices import program, targets
from flax_resnet.devices.parallel import Engine
from flax_resnet.devices.program import Kernel
from flax_resnet.devices.targets import Card, Target
from flax_resnet.errors import InputError
from flax_resnet.models import create_from_config
from flax_resnet.training import steps
from flax_resnet.training.network import Network
from flax_resnet.training.setup import functions

_OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0}, "tpu": {}}
"""Compiler options for a platform. The compiler for GPUs would choose among kernels by timing them
on the GPU."""

_STEPS_PER_EPOCH = 100  # a constant of the learning rate's schedule


class Data(NamedTuple):
    """The properties of the data that a program depends on."""

    image_shape: tuple[int, int, int]
    """`(H, W, C)`"""

    resident: int
    """Training images that lie on every device; 0: batches bring their own."""


class Compiled(NamedTuple):
    """A compiled step of a training or an evaluation. Numbers are those of one device."""

    target: Target
    num_devices: int
    batch_size: int
    num_steps: int
    """Steps of one call; the kernels and the text are those of the call."""

    kernels: list[Kernel]
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    seconds: float
    text: str
    executable: jax.stages.Compiled
    """Runs where the plan's devices are at hand."""

    @property
    def fits(self) -> bool:
        """True if the peak is within the memory of the card."""
        return self.peak_bytes <= self.target.card.memory_bytes

    @property
    def bytes(self) -> int:
        """Bytes that the kernels read and write."""
        return sum(k.times * k.bytes for k in self.kernels) // self.num_steps

    @property
    def flops(self) -> int:
        """FLOPs of convolutions and matrix products."""
        return sum(k.times * k.flops for k in self.kernels) // self.num_steps

    def by_layer(self) -> dict[tuple[str, str], int]:
        """{(layer, phase): bytes}, in the order of the forward pass."""
        sums = Counter()
        for kernel in self.kernels:
            sums[kernel.layer, kernel.phase] += kernel.times * kernel.bytes // self.num_steps
        return dict(sums)

    @property
    def bound_seconds(self) -> float:
        """The sum over the kernels of the longer of their arithmetic and their traffic."""
        card = self.target.card
        return sum(k.times * bound(k, card) for k in self.kernels) / self.num_steps

    @property
    def bound_images_per_second(self) -> float:
        """Images a second of all devices, which no run of this program exceeds."""
        return self.batch_size / self.bound_seconds


def bound(kernel: Kernel, card: Card) -> float:
    """Seconds that a kernel takes at least, by the card's data sheet."""
    return max(kernel.bytes / card.bandwidth, kernel.flops / _rate(kernel, card))


def _rate(kernel: Kernel, card: Card) -> float:
    dtype = kernel.dtype
    if dtype == "f32" and not kernel.full_precision:
        dtype = "tf32"
    return card.flops.get(dtype, max(card.flops.values()))


class Plan:
    """The steps of a config on a target, of any batch size.

    Args:
      config: its model and data are resolved but for mean and std, which change no program.
      evaluation: the step of an evaluation instead of that of the training.
      devices: devices of the target that are at hand; None: the target's as its compiler knows
        them.

    Raises:
      InputError: the target has no such devices or no compiler here, or pmap was asked for.
    """

    def __init__(
        self, config: TrainConfig, data: Data, target: Target, *, evaluation=False, devices=None
    ):
        if config.parallel.parallel == "pmap":
            raise InputError("`parallel` pmap: it compiles only for devices that are here")
        self.target, self.data, self.evaluation = target, data, evaluation
        channels = data.image_shape[-1]
        means = dataclasses.replace(config.data, mean=(0.5,) * channels, std=(0.5,) * channels)
        self.config = dataclasses.replace(config, data=means)
        self.engine = Engine(
            config.parallel,
            deterministic=config.deterministic,
            kernels=config.model.kernels,
            devices=_first(devices or targets.devices(target), config.parallel.devices, target),
        )
        self._options = {} if devices else _OPTIONS[target.card.platform]
        model = create_from_config(
            config.model,
            in_channels=channels,
            seed=config.seed,
            bn_axis_name=self.engine.axis_name,
        )
        self.layers = {m.layer_name for _, m in nnx.iter_modules(model) if hasattr(m, "layer_name")}
        self.network = Network(model, freeze_backbone=config.freeze_backbone)
        run = functions(
            self.config,
            self.engine,
            self.network,
            steps_per_epoch=_STEPS_PER_EPOCH,
            resident=bool(data.resident),
        )
        self.num_steps = 1 if evaluation else run["steps_per_dispatch"]
        self._step = run["eval_fn"] if evaluation else run["train_fns"][self.num_steps]

    @property
    def batch_size(self) -> int:
        """Images of a step as the config has it."""
        return self.config.eval_batch_size if self.evaluation else self.config.batch_size

    @property
    def _norm_images(self) -> int | None:
        return None if self.evaluation else self.config.model.batch_norm_images

    def can_share(self, batch_size: int) -> bool:
        """True if the devices can share a batch."""
        return self.engine.can_share(batch_size, self._norm_images)

    def compile(self, batch_size: int | None = None) -> Compiled | None:
        """Compile the step, which takes seconds to minutes.

        Returns:
          None if the compiler itself refuses the program for want of memory, as a TPU's does.

        Raises:
          InputError: the devices cannot share the batch.
        """
        batch_size = batch_size or self.batch_size
        self.engine.check_batch_size(batch_size, self._norm_images)
        start = time.monotonic()
        try:
            lowered = self._step.lower(*self._arguments(batch_size))
            compiled = lowered.compile(self._options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                return None
            raise
        text, memory = compiled.as_text(), compiled.memory_analysis()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        peak = arguments + temporaries + memory.generated_code_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
        return Compiled(
            target=self.target,
            num_devices=len(self.engine.devices),
            batch_size=batch_size,
            num_steps=self.num_steps,
            kernels=program.kernels(program.parse(text), self.layers),
            argument_bytes=arguments,
            temporary_bytes=temporaries,
            peak_bytes=peak,
            seconds=time.monotonic() - start,
            text=text,
            executable=compiled,
        )

    def _arguments(self, batch_size: int) -> tuple:
        """Shapes, types and shardings of the step's arguments."""
        images, labels = _images_like(batch_size, self.data.image_shape)
        if self.evaluation:
            mask = jax.ShapeDtypeStruct((batch_size,), bool)
            batch = {"image": images, "label": labels, "mask": mask}
            variables = self.engine.replicated_like(self.network.initial)
            return variables, self.engine.batches_like(batch, 1)
        state = jax.eval_shape(lambda v: steps.make_state(v, self.config), self.network.initial)
        batch, resident = {"index": labels}, {}
        if self.data.resident:
            kept = _images_like(self.data.resident, self.data.image_shape)
            resident = self.engine.replicated_like(dict(zip(("image", "label"), kept, strict=True)))
        else:
            batch |= {"image": images, "label": labels}
        return (
            self.engine.state_like(state),
            resident,
            self.engine.batches_like(batch, self.num_steps),
        )


def _images_like(count: int, image_shape: tuple[int, int, int]) -> tuple:
    images = jax.ShapeDtypeStruct((count, *image_shape), jnp.uint8)
    return images, jax.ShapeDtypeStruct((count,), jnp.int32)


def _first(devices: list, count: int | None, target: Target) -> list:
    if count and count > len(devices):
        raise InputError(f"`devices` {count}: {target.name} has {len(devices)}")
    return devices[:count]


def largest_batch(plan: Plan, first: Compiled | None) -> int | None:
    """The largest batch that fits, to about 3%; None if not even the smallest does.

    Each round compiles two programs at the same time. They narrow the range between the largest
    batch that fits and the smallest that does not.

    Args:
      first: the program of the config's own batch; None if the compiler refused it.
    """
    devices, made = len(plan.engine.devices), {0: None, plan.batch_size: first}
    for attempt in itertools.count():
        fitting = [batch for batch, program in made.items() if program and program.fits]
        low = max(fitting, default=0)
        high = min((batch for batch in made if batch > low), default=math.inf)
        filled = low and made[low].peak_bytes >= _FULL * plan.target.card.memory_bytes
        if filled or high - low <= max(devices, (1 - _FULL) * low):
            return low or None
        nearest = made[low] or made.get(high)
        thirds = nearest is None or (high < math.inf and attempt % 2)
        guesses = _thirds(low, high) if thirds else _guesses(nearest)
        tried = {_shared(plan, guess, low, high) for guess in guesses} - {None}
        if not tried:
            return low or None
        with ThreadPoolExecutor() as pool:
            made |= zip(tried, pool.map(plan.compile, tried), strict=True)


def _shared(plan: Plan, guess: int, low: int, high: float) -> int | None:
    """The batch between `low` and `high` that the devices can share: the first one from the guess
    downwards, else upwards; None if there is none."""
    devices = len(plan.engine.devices)
    guess = int(min(max(guess, low + devices), high - devices)) // devices * devices
    above = itertools.takewhile(lambda batch: batch < high, itertools.count(guess, devices))
    candidates = itertools.chain(range(guess, low, -devices), above)
    return next(filter(plan.can_share, candidates), None)


_FULL = 0.97
"""Share of the memory from which a card counts as full."""


def _guesses(program: Compiled) -> list[int]:
    """The batch that would fill the card if the memory beside the arguments were proportional to
    the batch, and a larger one, because it usually grows less."""
    room = program.target.card.memory_bytes - program.argument_bytes
    used = program.peak_bytes - program.argument_bytes
    filling = program.batch_size * room / max(used, 1)
    return [int(filling), int(1.2 * filling)]


def _thirds(low: int, high: int) -> list[int]:
    return [low + (high - low) // 3, low + 2 * (high - low) // 3]
