"""The machine and the versions behind a result, and torch's settings for a run."""

import os
import platform

import torch
import torchvision

from flax_resnet.config import TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.machine import processor, revision


def describe(device: torch.device) -> dict:
    """Versions, hardware and revision, for the report."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "num_threads": torch.get_num_threads(),
        "revision": revision(),
    }


def choose_device(config: TrainConfig, name: str | None) -> torch.device:
    """The device to run on: CUDA where there is one, unless a name is given.

    Raises:
      InputError: there is no such device, or it cannot do what the config asks for.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("`device` cuda: PyTorch finds no CUDA GPU here; take cpu")
    if config.deterministic and (device, config.model.arch) == ("cuda", "basic_cnn"):
        raise InputError(
            "`deterministic`: on CUDA, PyTorch's AdaptiveAvgPool2d, which basic_cnn has, is not;"
            " take `device` cpu"
        )
    return torch.device(device)


def configure_torch(config: TrainConfig) -> None:
    """Deterministic algorithms if the run asks for them, else cuDNN's fastest; TF32 as asked."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic cuBLAS needs
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.allow_tf32 = config.model.precision != "highest"
    torch.backends.cuda.matmul.allow_tf32 = config.model.precision == "tf32"
