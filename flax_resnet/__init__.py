"""ResNets in Flax NNX and Optax that compute what torchvision's compute in PyTorch.

Each public name is imported when it is first used.
"""

import glob
import importlib
import os
from typing import TYPE_CHECKING

# JAX's plugin for NVIDIA GPUs, with which `flax-resnet plan` compiles, asks the driver for versions
# when JAX starts; without a driver the process would end in a segmentation fault.
if not os.path.exists("/proc/driver/nvidia"):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# libtpu, with which `plan` compiles, would ask the network which TPU this machine is, and warn.
if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

if TYPE_CHECKING:
    from flax_resnet.config import TrainConfig
    from flax_resnet.errors import InputError
    from flax_resnet.interop.ensemble import ensemble
    from flax_resnet.interop.loaded_run import LoadedRun, load_run
    from flax_resnet.models import create_model, list_models
    from flax_resnet.training.fit import fit
    from flax_resnet.training.restore import pretrained
    from flax_resnet.weights.convert import load_state_dict, state_dict

__all__ = [
    "InputError",
    "LoadedRun",
    "TrainConfig",
    "create_model",
    "ensemble",
    "fit",
    "list_models",
    "load_run",
    "load_state_dict",
    "pretrained",
    "state_dict",
]

_MODULES = {
    "InputError": "errors",
    "LoadedRun": "interop.loaded_run",
    "TrainConfig": "config",
    "create_model": "models",
    "ensemble": "interop.ensemble",
    "fit": "training.fit",
    "list_models": "models",
    "load_run": "interop.loaded_run",
    "load_state_dict": "weights.convert",
    "pretrained": "training.restore",
    "state_dict": "weights.convert",
}


def __getattr__(name: str):
    """Import a public name when it is first used: the config alone needs no JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return __all__
