"""torch.optim's optimizers and schedules from plain numbers, and the moving average of weights."""

from typing import Annotated, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torch_ref.arguments import (
    Count,
    Divisor,
    Epochs,
    Factor,
    Fraction,
    Limits,
    NonNegative,
    Positive,
)


def make_optimizer(
    model: nn.Module,
    *,
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd",
    lr: Positive = 0.04,
    momentum: Fraction = 0.9,
    nesterov: bool = True,
    beta1: Fraction = 0.9,
    beta2: Fraction = 0.999,
    alpha: Fraction = 0.99,
    centered: bool = False,
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 5e-4,
    decoupled_weight_decay: bool = False,
    decay_norm_and_bias: bool = True,
) -> Optimizer:
    """An optimizer over the parameters of `model` that ask for a gradient.

    Args:
      momentum: sgd and rmsprop.
      nesterov: sgd only.
      beta1, beta2: adam and adamw.
      alpha, centered: rmsprop.
      eps: adam, adamw and rmsprop.
      weight_decay: added to the gradient, except for adamw and `decoupled_weight_decay`.
      decoupled_weight_decay: shrink the weights by lr * weight_decay before each step instead.
      decay_norm_and_bias: decay BatchNorm parameters and biases too.
    """
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias)
    if optimizer in ("adam", "adamw"):
        decoupled = decoupled_weight_decay or optimizer == "adamw"
        rule = torch.optim.AdamW if decoupled else torch.optim.Adam
        return rule(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    if decoupled_weight_decay:
        for group in groups:
            group["decoupled_weight_decay"] = group.pop("weight_decay")
    if optimizer == "sgd":
        # Without momentum Nesterov's step is the plain one, but torch refuses the pair.
        nesterov = nesterov and momentum > 0
        made = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)
    elif optimizer == "rmsprop":
        made = torch.optim.RMSprop(
            groups, lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered
        )
    else:
        raise ValueError(f"optimizer {optimizer!r} is none of sgd, adam, adamw, rmsprop")
    if decoupled_weight_decay:
        made.register_step_pre_hook(shrink_weights)
    return made


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list:
    """One group, or two of which the second, BatchNorm parameters and biases, never decays."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if decay_norm_and_bias:
        return [{"params": trainable, "weight_decay": weight_decay}]
    # Every convolution and linear weight has two dimensions or more; nothing else has.
    weights = [p for p in trainable if p.ndim > 1]
    spared = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]


@torch.no_grad()
def shrink_weights(optimizer: Optimizer, args, kwargs) -> None:
    """Decoupled weight decay as AdamW has it, before the step of any other rule."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.mul_(1 - group["lr"] * group["decoupled_weight_decay"])


def make_schedulers(
    optimizer: Optimizer,
    epochs: int,
    steps_per_epoch: float,
    mode: Literal["min", "max"] = "max",
    *,
    schedule: Literal[
        "constant", "step", "multistep", "cosine", "onecycle", "plateau"
    ] = "onecycle",
    warmup_epochs: Annotated[float, Limits(0, 100_000)] = 0.0,
    warmup_factor: Factor = 0.01,
    step_epochs: Epochs = 30,
    milestones: tuple[Epochs, ...] = (100, 150),
    gamma: Factor = 0.1,
    min_lr: NonNegative = 0.0,
    pct_start: Annotated[float, Limits(0, 1, without=(0, 1))] = 0.3,
    div_factor: Divisor = 25.0,
    final_div_factor: Divisor = 1e4,
    cycle_momentum: bool = False,
    plateau_patience: Count = 10,
    plateau_threshold: NonNegative = 1e-4,
    plateau_cooldown: Count = 0,
) -> tuple[LRScheduler, ReduceLROnPlateau | None]:
    """Two schedulers of torch: one to step after every update, one to step after every epoch.

    The second takes the monitored value and is None for every schedule but "plateau", of which
    the first is the warm-up. Lengths are in epochs: with `steps_per_epoch` 1, in steps.

    Args:
      steps_per_epoch: updates in an epoch.
      mode: plateau: whether less or more of the monitored value is better.
      warmup_epochs: linear warm-up before the schedule starts; onecycle and cosine end with the
        run all the same.
      warmup_factor: share of the schedule's first learning rate at which the warm-up starts;
        with onecycle that rate is lr / div_factor.

    Raises:
      ValueError: `cycle_momentum` with another schedule than onecycle, or without momentum; a
        onecycle that rises for exactly one step.
    """
    if cycle_momentum and schedule != "onecycle":
        raise ValueError(f"cycle_momentum is of onecycle, not of {schedule}")
    if cycle_momentum and optimizer.defaults.get("momentum") == 0:
        raise ValueError("cycle_momentum: the optimizer has momentum 0, none to move")

    def in_steps(length: float) -> int:
        return max(1, round(length * steps_per_epoch))

    warmup_steps = round(warmup_epochs * steps_per_epoch)
    total_steps = max(1, round(epochs * steps_per_epoch) - warmup_steps)
    max_lr = [group["lr"] for group in optimizer.param_groups]
    start = warmup_factor if warmup_steps else 1.0
    warmup = lr_scheduler.LinearLR(optimizer, start, total_iters=max(1, warmup_steps))
    match schedule:
        case "constant":
            main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        case "step":
            main = lr_scheduler.StepLR(optimizer, in_steps(step_epochs), gamma)
        case "multistep":
            main = lr_scheduler.MultiStepLR(optimizer, [in_steps(m) for m in milestones], gamma)
        case "cosine":
            main = lr_scheduler.CosineAnnealingLR(optimizer, total_steps, eta_min=min_lr)
        case "onecycle":
            if pct_start * total_steps == 1:
                raise ValueError("pct_start: one step of rising, where OneCycleLR divides by zero")
            main = lr_scheduler.OneCycleLR(
                optimizer,
                max_lr,
                total_steps=total_steps,
                pct_start=pct_start,
                div_factor=div_factor,
                final_div_factor=final_div_factor,
                cycle_momentum=cycle_momentum,
            )
        case "plateau":
            return warmup, lr_scheduler.ReduceLROnPlateau(
                optimizer,
                mode,
                factor=gamma,
                patience=plateau_patience,
                threshold=plateau_threshold,
                cooldown=plateau_cooldown,
                min_lr=min_lr,
            )
        case _:
            raise ValueError(f"unknown schedule {schedule!r}")
    if warmup_steps:
        main = lr_scheduler.SequentialLR(optimizer, [warmup, main], [warmup_steps])
    return main, None


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Moving average of the weights; its BatchNorm statistics are those of the last update."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


@torch.no_grad()
def take_statistics(ema: AveragedModel, model: nn.Module) -> None:
    """Give the average BatchNorm's newest statistics: batches that only accumulate gradients
    change them without an update."""
    for averaged, newest in zip(ema.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(newest)
