"""Accelerators that are not here, as their compilers know them: cards, targets, devices.

A target is a card and how many of them: "h100", "h100:8" (one host), "h100:8x8" (hosts x GPUs),
"v5e" (one chip), "v5e:2x2", "v5p:2x2x1" (the chips along each axis).
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from flax_resnet.config import nearest
from flax_resnet.errors import InputError, extra_needed

GPUS_PER_HOST = 8
"""GPUs of a host at most, as the machines with these cards are built (HGX)."""


class Card(NamedTuple):
    """Figures of data sheets. They bound what a program can reach; no program reaches them."""

    platform: str
    """"cuda" or "tpu"."""

    memory_bytes: int

    bandwidth: float
    """Bytes a second between chip and memory."""

    flops: dict[str, float]
    """FLOPs a second of products without sparsity: {type of the operands, or "tf32": number}."""

    description: str
    """The properties that the compiler asks for ("cuda"), or the axes of the chips ("tpu")."""

    source: str


def _gpu(name, *, cores, fpus, shared, l2, clock, capability, memory, bandwidth) -> str:
    """A GpuTargetConfigProto in text form; the figures are those of XLA's own files."""
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(bandwidth)} device_memory_size: {memory} l2_cache_size: {l2}
          clock_rate_ghz: {clock} cuda_compute_capability {{ major: {capability} }}
        }}
        platform_name: "CUDA" device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
    """


def _cuda(name, source, flops, *, memory, bandwidth, **properties) -> Card:
    text = _gpu(name, memory=memory, bandwidth=bandwidth, **properties)
    return Card("cuda", memory, bandwidth, flops, text, source)


_XLA = "openxla/xla, xla/backends/gpu/target_config/specs"
_HOPPER = dict(cores=132, fpus=128, shared=233472, l2=52428800, clock=1.98, capability=9)
_HOPPER_FLOPS = {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12, "f64": 67e12}

CARDS = {
    "a100": _cuda(
        "NVIDIA A100-SXM4-80GB",
        f"NVIDIA A100 data sheet (SXM, 80 GB); {_XLA}/a100_sxm_80.txtpb",
        {"bf16": 312e12, "f16": 312e12, "tf32": 156e12, "f32": 19.5e12, "f64": 19.5e12},
        memory=85100068864, bandwidth=2.03904e12,
        cores=108, fpus=64, shared=167936, l2=41943040, clock=1.41, capability=8,
    ),
    "h100": _cuda(
        "NVIDIA H100 80GB HBM3",
        f"NVIDIA H100 data sheet (SXM), half of its figures with sparsity; {_XLA}/h100_sxm.txtpb",
        _HOPPER_FLOPS, memory=84942979072, bandwidth=3.35232e12, **_HOPPER,
    ),
    "h200": _cuda(
        "NVIDIA H200 141GB HBM3e",
        f"NVIDIA H200 data sheet (SXM), half of its figures with sparsity; {_XLA}/h200.txtpb",
        _HOPPER_FLOPS, memory=151397597184, bandwidth=4.8e12, **_HOPPER,
    ),
    "b200": _cuda(
        "NVIDIA B200",
        f"NVIDIA HGX B200 data sheet, an eighth of its dense figures; {_XLA}/b200.txtpb",
        {"bf16": 2.25e15, "f16": 2.25e15, "tf32": 1.1e15, "f32": 75e12, "f64": 37e12},
        memory=191514411008, bandwidth=7.67232e12,
        cores=148, fpus=128, shared=233472, l2=132644864, clock=1.965, capability=10,
    ),
    "v5e": Card(
        "tpu", 16 * 2**30, 819e9, {"bf16": 197e12, "tf32": 197e12, "f32": 197e12 / 6}, "1x1",
        "Google Cloud documentation, TPU v5e",
    ),
    "v5p": Card(
        "tpu", 95 * 2**30, 2765e9, {"bf16": 459e12, "tf32": 459e12, "f32": 459e12 / 6}, "1x1x1",
        "Google Cloud documentation, TPU v5p",
    ),
    "v6e": Card(
        "tpu", 32 * 2**30, 1640e9, {"bf16": 918e12, "tf32": 918e12, "f32": 918e12 / 6}, "1x1",
        "Google Cloud documentation, TPU v6e",
    ),
}  # fmt: skip
"""The cards by name. A TPU multiplies bfloat16 only: a float32 product takes one pass as JAX asks
for it by default ("tf32" here), and six in full precision."""

_EXTRAS = {
    "cuda": ("plan", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("tpu", ("libtpu",)),
}
"""{platform: (the extra that brings its compiler, the packages of which one is enough)}"""


class Target(NamedTuple):
    """A card and how many of them."""

    name: str
    card: Card

    shape: tuple[int, ...]
    """(hosts, GPUs of a host), or the chips along each axis."""

    @property
    def num_devices(self) -> int:
        """Number of GPUs or chips."""
        return math.prod(self.shape)


def parse(word: str) -> Target:
    """The target of a word such as "h100:8x8".

    Raises:
      InputError: an unknown card, whose nearest valid name is given, or an impossible shape.
    """
    name, colon, sizes = word.partition(":")
    if name not in CARDS:
        raise InputError(f"unknown target {word!r}{nearest(name, CARDS)}")
    card = CARDS[name]
    if colon and not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", sizes, re.ASCII):
        raise InputError(f"target {word!r}: {sizes!r} is no shape such as {_example(name)}")
    shape = tuple(int(size) for size in sizes.split("x")) if colon else ()
    shape = _gpus(word, shape) if card.platform == "cuda" else _chips(word, card, shape)
    return Target(word, card, shape)


def _example(name: str) -> str:
    return f"{name}:8x8" if CARDS[name].platform == "cuda" else f"{name}:{_twos(CARDS[name])}"


def _twos(card: Card) -> str:
    return "2x2" if card.description == "1x1" else "2x2x1"


def _gpus(word, shape) -> tuple[int, ...]:
    hosts, each = (1, *shape)[-2:] if shape else (1, 1)
    if len(shape) > 2 or each > GPUS_PER_HOST:
        raise InputError(
            f"target {word!r}: a host has at most {GPUS_PER_HOST} GPUs; hosts x GPUs are written"
            f" {word.partition(':')[0]}:8x8"
        )
    return hosts, each


def _chips(word, card, shape) -> tuple[int, ...]:
    axes = tuple(int(size) for size in card.description.split("x"))
    if shape and len(shape) != len(axes):
        raise InputError(f"target {word!r}: its chips have {len(axes)} axes, as in {_twos(card)}")
    return shape or axes


def devices(target: Target) -> list:
    """The devices of a target as its compiler describes them, in the order of `jax.devices()`.

    They can be compiled for and hold no array.

    Raises:
      InputError: the compiler is not installed (the message says how), or does not know the shape.
    """
    _check_compiler(target)
    _keep_to_the_cpu()
    try:
        if target.card.platform == "cuda":
            return _cuda_devices(target)
        return _tpu_devices(target)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(f"target {target.name!r}: {_first_line(error)}") from None


def _cuda_devices(target: Target) -> list:
    hosts, each = target.shape
    return topologies.get_topology_desc(
        target.name,
        platform="cuda",
        target_config=target.card.description,
        topology=f"{hosts}x{each}x1",
    ).devices


def _tpu_devices(target: Target) -> list:
    # Nothing runs on a TPU here, so that another process may have one at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    name = f"{target.name.partition(':')[0]}:{'x'.join(map(str, target.shape))}"
    # A whole host has four chips; only one chip alone is a smaller machine.
    alone = {"chips_per_host_bounds": [1, 1, 1]} if target.num_devices == 1 else {}
    return topologies.get_topology_desc(name, platform="tpu", **alone).devices


def _keep_to_the_cpu():
    """Let JAX itself use the CPU. Otherwise it would take the GPU or TPU of this machine, or look
    for one and complain, though nothing runs on it. As long as no device has been used, a setting
    in the process does it; an environment variable would have to be set before the start."""
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def _check_compiler(target: Target):
    extra, packages = _EXTRAS[target.card.platform]
    if not any(importlib.util.find_spec(package) for package in packages):
        raise extra_needed(f"target {target.name!r}", "its compiler", extra)


def _first_line(error) -> str:
    return str(error).strip().partition("\n")[0]
