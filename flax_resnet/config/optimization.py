"""Settings of optimizer, schedule and early stopping."""

import itertools
from typing import Annotated, Literal

from pydantic import Field

from flax_resnet.config.fields import (
    INT32,
    LARGEST,
    Count,
    Epochs,
    Factor,
    Fraction,
    Name,
    NonNegative,
    Positive,
    dataclass,
)


@dataclass
class OptimizerConfig:
    """Optimizer and loss, with PyTorch's definitions (`optim.py`)."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "lamb"] = "sgd"
    """Name of the optimizer."""

    lr: Positive = 0.04
    """Highest learning rate of the schedule."""

    head_lr: Positive | None = None
    """Highest learning rate of the last linear layer, which follows the same schedule. Default:
    `lr`."""

    momentum: Fraction = 0.9
    """Momentum of sgd and rmsprop."""

    nesterov: bool = True
    """Nesterov momentum of sgd."""

    beta1: Fraction = 0.9
    """Decay of the mean gradient in adam, adamw and lamb."""

    beta2: Fraction = 0.999
    """Decay of the mean squared gradient in adam, adamw and lamb."""

    alpha: Fraction = 0.99
    """Decay of the mean squared gradient in rmsprop."""

    centered: bool = False
    """Subtract the mean gradient in rmsprop."""

    eps: Positive = 1e-8
    """Term added to the square root in the denominator of adam, adamw, rmsprop
    and lamb."""

    weight_decay: NonNegative = 5e-4
    """Weight decay, coupled (L2, added to the gradient) except in adamw and with
    `decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """Shrink the weights by lr * weight_decay in every optimizer."""

    decay_norm_and_bias: bool = True
    """Decay BatchNorm parameters and biases too, as torch.optim does by default."""

    norm_weight_decay: NonNegative | None = None
    """Weight decay of BatchNorm's parameters. Default: `weight_decay`."""

    l1: NonNegative = 0.0
    """Factor of the sum of absolute weights that is added to the loss."""

    label_smoothing: Fraction = 0.1
    """Share of the target that is spread evenly over all classes."""

    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """Loss of the training: softmax cross-entropy, or the mean of binary cross-entropies of all
    classes, as in timm."""

    bce_threshold: Fraction | None = None
    """Targets of bce above this become 1, others 0. Default: targets stay as they are."""

    class_weights: Name | None = None
    """Weights of the classes in the training loss, as those of torch's CrossEntropyLoss: "balanced"
    (inversely proportional to their images) or a JSON file with {"CLASS": weight}."""

    clip_norm: NonNegative = 0.0
    """Largest global norm of the gradients; 0 is off."""

    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of batches whose gradients are averaged into one update."""

    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights, which evaluation uses; 0 is off."""

    ema_steps: Annotated[int, Field(ge=1, le=INT32)] = 1
    """Updates of the weights between two updates of the moving average; the first update of the
    weights enters it."""

    ema_after_warmup: bool = False
    """Start the moving average when the warm-up ends; until then it is a copy of the weights."""

    def __post_init__(self):
        if self.optimizer == "lamb" and self.decoupled_weight_decay:
            raise ValueError("`decoupled_weight_decay`: lamb has none")
        if self.class_weights and self.loss != "cross_entropy":
            raise ValueError(f"`class_weights` needs `loss` cross_entropy, got {self.loss}")
        if self.norm_weight_decay is not None and not self.decay_norm_and_bias:
            raise ValueError("`norm_weight_decay` needs `decay_norm_and_bias`")


@dataclass
class ScheduleConfig:
    """Learning rate over the epochs, with PyTorch's definitions (`optim.py`)."""

    schedule: Literal["constant", "step", "multistep", "cosine", "onecycle", "plateau"] = "onecycle"
    """Name of the learning rate's schedule."""

    warmup_epochs: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Epochs of linear warm-up before the schedule starts."""

    warmup_factor: Factor = 0.01
    """First learning rate of the warm-up, as a share of the schedule's first one (with onecycle,
    `lr` / `div_factor`)."""

    warmup_within: bool = False
    """Let the warm-up replace the first epochs of the cosine schedule, as in timm, instead of
    coming before them."""

    schedule_per: Literal["update", "epoch"] = "update"
    """Time at which the learning rate changes: after every update, or after every epoch as in the
    reference trainings of torchvision and timm."""

    step_epochs: Epochs = 30
    """Epochs between two cuts of the learning rate in the step schedule."""

    milestones: tuple[Epochs, ...] = (100, 150)
    """Epochs at which the multistep schedule cuts the learning rate."""

    gamma: Factor = 0.1
    """Factor by which a cut of the step, multistep and plateau schedules multiplies the learning
    rate."""

    min_lr: NonNegative = 0.0
    """Lowest learning rate of the cosine and plateau schedules."""

    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the steps in which onecycle's learning rate rises."""

    div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 25.0
    """Ratio of onecycle's highest learning rate to its initial one."""

    final_div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 1e4
    """Ratio of onecycle's initial learning rate to its final one."""

    cycle_momentum: bool = False
    """Let onecycle move the momentum from 0.95 to 0.85 and back, against the learning rate."""

    plateau_patience: Count = 10
    """Epochs without improvement before the plateau schedule cuts the learning rate."""

    plateau_threshold: NonNegative = 1e-4
    """Relative change that the plateau schedule counts as an improvement."""

    plateau_cooldown: Count = 0
    """Epochs that the plateau schedule waits after a cut."""

    def __post_init__(self):
        if not self.milestones:
            raise ValueError("`milestones`: at least one is needed")
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            given = " ".join(map(str, self.milestones))
            raise ValueError(
                f"`milestones`: each must be later than the one before it, got {given}"
            )


@dataclass
class EarlyStoppingConfig:
    patience: Count = 0
    """Epochs without improvement before the run stops; 0 never stops it."""

    monitor: Literal["validation_loss", "validation_accuracy", "validation_f1_macro"] = (
        "validation_loss"
    )
    """Metric that drives the best checkpoint, early stopping and the plateau schedule."""

    min_delta: NonNegative = 0.0
    """Absolute change of the metric that counts as an improvement."""

    restore_best: bool = True
    """Report on and export the best weights instead of the last."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """The direction in which the figure improves."""
        return "min" if self.monitor == "validation_loss" else "max"
