"""The machine and the versions behind a result, and torch's settings for a run."""

import os
import platform
import subprocess
from pathlib import Path

import torch
import torchvision

from flax_resnet.config import TrainConfig
from flax_resnet.errors import InputError


def describe(device: torch.device) -> dict:
    """Versions, hardware and revision, for the report."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "num_threads": torch.get_num_threads(),
        "revision": revision(),
    }


def _processor() -> str:
    """Name of the device, as in the reports of flax_resnet."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform._processor() or "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform._processor() or "cpu"


def revision() -> str | None:
    """The commit of the code, with "+" where it was changed since; None outside git or without."""
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def choose_device(config: TrainConfig, name: str | None) -> torch.device:
    """The device to run on: CUDA where there is one, unless a name is given.

    Raises:
      InputError: there is no such device, or it cannot do what the config asks for.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: there is none")
    if config.deterministic and (device, config.model.arch) == ("cuda", "basic_cnn"):
        raise InputError("deterministic: AdaptiveAvgPool2d of basic_cnn is not, on CUDA")
    return torch.device(device)


def configure_torch(config: TrainConfig) -> None:
    """Deterministic algorithms if the run asks for them, else cuDNN's fastest; TF32 as asked."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic cuBLAS needs
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.allow_tf32 = config.model.precision != "highest"
    torch.backends.cuda.matmul.allow_tf32 = config.model.precision == "tf32"
