"""A run directory without a training, and the content of folders."""

import os
from pathlib import Path

import jax.numpy as jnp

from flax_resnet.config import TrainConfig, to_dict
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.directory import RunDirectory


def tree(folder: Path) -> dict:
    """{path: content} of everything below; the content of a link is its target."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def without_training(run_dir: Path) -> Path:
    """The directory of a run that was cut off after one epoch."""
    directory = RunDirectory(run_dir)
    directory.write_config(TrainConfig())
    directory.start_logs(None, 0)
    directory.log_epoch(5, {"epoch": 1, "loss": 0.5}, {"epoch": 1, "seconds": 2.5})
    document = {
        "config": to_dict(TrainConfig()),
        "progress": {"epoch": 1},
        "tables": directory.marks(),
    }
    checkpoints = Checkpoints(directory.checkpoints)
    checkpoints.save(5, {"a": jnp.arange(9.0)}, document, improvement=False)
    checkpoints.close()
    directory.close()
    return run_dir
