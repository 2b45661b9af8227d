"""Small trainings of the twin, in Python and by its command."""

import sys
from unittest import mock

import numpy as np
import pytest

from flax_resnet.commands import cli, exits
from flax_resnet.config import DataConfig, TrainConfig
from torch_ref import checkpoint
from torch_ref import sources as torch_sources
from torch_ref import train as torch_train


def small(**changes) -> TrainConfig:
    """An epoch of resnet20 on 64 digits, otherwise the defaults and `changes`."""
    base = {"epochs": 1, "batch_size": 32, "model": {"arch": "resnet20"}}
    base |= {"data": {"train_images": 64, "eval_images": 20}}
    return cli.merge(cli.merge(TrainConfig(), base), changes)


def fit(run_dir, **changes) -> tuple[dict, dict[str, np.ndarray]]:
    """Report and weights."""
    report = torch_train.fit(small(**changes), run_dir)
    return report, checkpoint.load(run_dir / "weights.pth")


def call(*flags) -> int:
    """The exit status of `python -m torch_ref.train`, in this process."""
    with mock.patch.object(sys, "argv", ["torch_ref.train", *map(str, flags)]):
        with pytest.raises(SystemExit) as left:
            exits.run_command(torch_train.main)
    return left.value.code


def open_twin(**fields) -> torch_sources.DataSet:
    return torch_sources.open_dataset(DataConfig(**fields))
