"""The settings of a run: frozen, keyword-only dataclasses that are checked when they are made.

Every field has one default, written in this package, and a docstring with its unit. The command
line (`cli.py`) makes its flags from these fields, so a name must be unique across all groups.
"""

from flax_resnet.config.data import AugmentConfig, DataConfig
from flax_resnet.config.effects import USED_WITH, check_unvalidated, idle
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
from flax_resnet.config.model import (
    WITH_SHORTCUTS,
    WITH_STEMS,
    Architecture,
    Kernels,
    ModelConfig,
    Shortcut,
    Stem,
    check_shortcut,
    check_stem,
)
from flax_resnet.config.optimization import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig
from flax_resnet.config.resolve import natural_size, resolve
from flax_resnet.config.train import ParallelConfig, TrainConfig

__all__ = [
    "Architecture",
    "AugmentConfig",
    "DataConfig",
    "EarlyStoppingConfig",
    "INT32",
    "Kernels",
    "LARGEST",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SMALLEST",
    "ScheduleConfig",
    "Shortcut",
    "Stem",
    "TrainConfig",
    "USED_WITH",
    "WITH_SHORTCUTS",
    "WITH_STEMS",
    "check_shortcut",
    "check_stem",
    "check_unvalidated",
    "class_weights_from_file",
    "config_from_file",
    "differences",
    "finite",
    "flat",
    "from_dict",
    "idle",
    "natural_size",
    "nearest",
    "resolve",
    "to_dict",
]
