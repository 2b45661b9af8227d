"""What a run leaves behind: metrics.csv, report.json and weights.pth."""

import csv
import json
import platform
import subprocess
from pathlib import Path

import torch
import torchvision
from torch import nn

from torch_ref import checkpoint


def log(row: dict, epochs: int, run_dir: Path | None) -> None:
    """A line on the screen and, in a run directory, a row of metrics.csv."""
    shown = ("train_loss", "validation_loss", "validation_accuracy")
    figures = [f"{name} {row[name]:.4f}" for name in shown if name in row]
    print(f"epoch {row['epoch']:3d}/{epochs}", *figures, sep="  ", flush=True)
    if run_dir is None:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "metrics.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def environment(device: torch.device) -> dict:
    """What the figures depend on."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "num_threads": torch.get_num_threads(),
        "revision": revision(),
    }


def processor() -> str:
    """The name of the processor, as the JAX side's reports call it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def revision() -> str | None:
    """The commit of the code, with "+" where it was changed since; None outside git or without."""
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        found = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def keep(run_dir: Path, model: nn.Module, report: dict) -> None:
    """The weights and the report of a finished run."""
    checkpoint.save(run_dir / "weights.pth", checkpoint.to_arrays(model.state_dict()))
    (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
