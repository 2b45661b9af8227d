"""All settings of a run."""

from typing import Annotated, Literal

from pydantic import Field

from flax_resnet.config.data import AugmentConfig, DataConfig
from flax_resnet.config.fields import (
    LARGEST,
    BatchSize,
    Count,
    Epochs,
    Name,
    PositiveCount,
    dataclass,
)
from flax_resnet.config.model import ModelConfig
from flax_resnet.config.optimization import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig


@dataclass
class ParallelConfig:
    parallel: Literal["auto", "jit", "pmap"] = "auto"
    """Transformation that runs a step on all devices: jit over a mesh, or pmap. "auto" is jit."""

    devices: PositiveCount | None = None
    """Number of devices. Default: all."""

    shard_parameters: bool = False
    """Shard parameters and optimizer state over the devices instead of replicating them (FSDP):
    less memory, the same numbers. Not under pmap."""

    reduce_dtype: Literal["bfloat16"] | None = None
    """Type in which devices exchange gradients: bfloat16 takes half the bytes and loses digits with
    every device. Default: the type of the parameters. Not with `shard_parameters`."""

    steps_per_dispatch: PositiveCount | None = None
    """Training steps that one call (dispatch) starts on the device. Default: 20 if the images are
    on a GPU or TPU, else 1."""


@dataclass
class TrainConfig:
    """All settings of a run. Every field has a default, and the config is checked when it is made.

    Raises:
      InputError: a value out of range, an unknown field or settings that exclude each other.

    Examples:
      >>> config = flax_resnet.TrainConfig(epochs=2, data={"dataset": "folder:birds"})
      >>> config.optimizer.lr
      0.04
    """

    epochs: Epochs = 16
    """Passes over the training split."""

    batch_size: BatchSize = 128
    """Images in a training step, over all devices."""

    eval_batch_size: BatchSize = 256
    """Images in an evaluation step, over all devices."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed for initialization, data order, augmentation and dropout."""

    init_from: Name | None = None
    """Weights to fine-tune: a file, a run directory, torchvision:ARCH[:WEIGHTS], timm:NAME,
    hf:OWNER/REPO or a URL. The head (the last layer) starts from random weights if the number of
    classes differs. What comes with the weights (network, normalisation, sizes, interpolation) is
    the default of the command's flags."""

    weights_key: Name | None = None
    """Key or prefix of the network in the file of `init_from`, such as "state_dict" or "encoder_k".
    Default: the only network, or the only one that is not an average."""

    ema: bool = False
    """Fine-tune the averaged weights of a file of `init_from` that holds raw ones too."""

    new_head: bool = False
    """Fine-tune with a new head even where the old one would fit."""

    freeze_backbone: bool = False
    """Train only the last linear layer; BatchNorm's statistics stay as they are."""

    log_steps: PositiveCount = 20
    """Steps after which the loss is checked and logged."""

    checkpoint_epochs: PositiveCount = 1
    """Epochs from one checkpoint to the next; a checkpoint is also written at every improvement."""

    skip_nonfinite: Count = 0
    """Consecutive updates with non-finite gradients that are skipped before the run stops."""

    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/flax_resnet for the next start."""

    deterministic: bool = False
    """Use only operations that give the same bits on a GPU too, at some cost. Not under pmap."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    def __post_init__(self):
        data, optimizer = self.data, self.optimizer
        group = self.model.batch_norm_images
        if group and self.batch_size % group:
            raise ValueError(
                f"`batch_norm_images` {group} does not divide `batch_size` {self.batch_size}"
            )
        for name in ("weights_key", "ema", "new_head", "freeze_backbone"):
            if getattr(self, name) and not self.init_from:
                raise ValueError(f"`{name}` is for fine-tuning: it needs `init_from`")
        if group and self.freeze_backbone:
            raise ValueError(
                "`batch_norm_images`: with `freeze_backbone` BatchNorm keeps its statistics"
            )
        if self.augment.random_resized_crop and data.cache == "device":
            raise ValueError("`random_resized_crop` decodes files anew: `cache` device has no use")
        if self.augment.repeated_augmentation > 1 and data.sampler == "balanced":
            raise ValueError("`repeated_augmentation` needs `sampler` shuffle")
        if optimizer.head_lr and self.schedule.min_lr:
            raise ValueError("`head_lr` needs `min_lr` 0, which would be a rate of both")
        if optimizer.head_lr and optimizer.head_lr > optimizer.lr * LARGEST:
            given = f"{optimizer.head_lr:g} and {optimizer.lr:g}"
            raise ValueError(f"`head_lr` is at most {LARGEST:g} times `lr`, got {given}")
        if self.schedule.cycle_momentum and self.schedule.schedule != "onecycle":
            given = self.schedule.schedule
            raise ValueError(f"`cycle_momentum` needs `schedule` onecycle, got {given}")
        if self.deterministic and self.model.kernels == "library":
            raise ValueError(
                "`deterministic` needs `kernels` auto: on a GPU the library's max-pool has no"
                " deterministic gradient"
            )
        still = optimizer.optimizer in ("sgd", "rmsprop") and not optimizer.momentum
        if self.schedule.cycle_momentum and still:
            raise ValueError(f"`cycle_momentum`: {optimizer.optimizer} has `momentum` 0")
