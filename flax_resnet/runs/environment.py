"""The software and hardware of a run, and JAX's settings for it."""

import os
import platform
from importlib import metadata
from pathlib import Path

import jax

from flax_resnet.config import ModelConfig, TrainConfig
from flax_resnet.machine import processor, revision

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(num_devices: int) -> dict:
    """Versions (None if a package is not installed), hardware and revision, for a report."""
    device = jax.devices()[0]
    versions = {name.replace("-", "_"): _version(name) for name in _PACKAGES}
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "cpu_cores": os.cpu_count(),
        "num_devices": num_devices,
        "revision": revision(),
    }


_ROUNDED = {
    ("gpu", "default"): "convolutions in TF32, linear layers in float32",
    ("gpu", "tf32"): "convolutions and linear layers in TF32",
    ("tpu", "default"): "convolutions in one bfloat16 pass, linear layers in float32",
    ("tpu", "tf32"): "convolutions and linear layers in three bfloat16 passes",
}


def products(model: ModelConfig, platform: str) -> str:
    """The type in which a platform ("cpu", "gpu", "tpu") computes the products of a network."""
    rounded = _ROUNDED.get((platform, model.precision)) if model.dtype == "float32" else None
    return rounded or f"convolutions and linear layers in {model.dtype}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code() -> dict:
    """Versions and revision, for processes to compare."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {**versions, "revision": revision()}


def configure_jax(config: TrainConfig):
    """Enable float64 and, if its folder is writable, the compilation cache, as the config asks."""
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    if not config.compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    place = _cache()
    if place is not None:
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _cache() -> Path | None:
    """The folder of the compilation cache, or None if it is not writable."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(root, "flax_resnet", "jax")
    existing = next((p for p in (place, *place.parents) if os.path.exists(p)), place)
    usable = place.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK)
    return place if usable else None
