"""The settings of a run: frozen, keyword-only dataclasses that are checked when they are made.

Every field has one default, written in this package, and a docstring with its unit. The command
line (`cli.py`) makes its flags from these fields, so a name must be unique across all groups.
"""

from flax_resnet.config.data import AugmentConfig, DataConfig
from flax_resnet.config.effects import USED_WITH, idle
from flax_resnet.config.fields import INT32, LARGEST, SMALLEST, nearest
from flax_resnet.config.files import (
    class_weights_from_file,
    config_from_file,
    differences,
    finite,
    flat,
    from_dict,
    to_dict,
)
from flax_resnet.config.model import WITH_SHORTCUTS, Architecture, ModelConfig
from flax_resnet.config.optimization import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig
from flax_resnet.config.train import ParallelConfig, TrainConfig

__all__ = [
    "Architecture",
    "AugmentConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "INT32",
    "LARGEST",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SMALLEST",
    "ScheduleConfig",
    "TrainConfig",
    "USED_WITH",
    "WITH_SHORTCUTS",
    "class_weights_from_file",
    "config_from_file",
    "differences",
    "finite",
    "flat",
    "from_dict",
    "idle",
    "nearest",
    "to_dict",
]
