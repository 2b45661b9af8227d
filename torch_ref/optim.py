"""torch.optim's optimizers and schedules from a config, and the moving average of weights."""

from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flax_resnet.config import OptimizerConfig, ScheduleConfig
from flax_resnet.errors import InputError


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """An optimizer over the parameters of `model` that ask for a gradient."""
    groups = parameter_groups(model, config)
    if config.optimizer in ("adam", "adamw"):
        decoupled = config.decoupled_weight_decay or config.optimizer == "adamw"
        rule = torch.optim.AdamW if decoupled else torch.optim.Adam
        return rule(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.decoupled_weight_decay:
        for group in groups:
            group["decoupled_weight_decay"] = group.pop("weight_decay")
    optimizer = _sgd(groups, config) if config.optimizer == "sgd" else _rmsprop(groups, config)
    if config.decoupled_weight_decay:
        optimizer.register_step_pre_hook(shrink_weights)
    return optimizer


def _sgd(groups: list[dict], config: OptimizerConfig) -> Optimizer:
    # Without momentum Nesterov's step is the plain one, but torch refuses the pair.
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def _rmsprop(groups: list[dict], config: OptimizerConfig) -> Optimizer:
    return torch.optim.RMSprop(
        groups,
        lr=config.lr,
        alpha=config.alpha,
        eps=config.eps,
        momentum=config.momentum,
        centered=config.centered,
    )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """One group, or two of which the second, BatchNorm parameters and biases, never decays."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norm_and_bias:
        return [{"params": trainable, "weight_decay": config.weight_decay}]
    # Every convolution and linear weight has two dimensions or more; nothing else has.
    weights = [p for p in trainable if p.ndim > 1]
    spared = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": weights, "weight_decay": config.weight_decay},
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
    config: ScheduleConfig,
    updates_per_epoch: float,
    epochs: int,
    mode: Literal["min", "max"] = "max",
) -> tuple[LRScheduler, ReduceLROnPlateau | None]:
    """Two schedulers of torch: one to step after every update, one to step after every epoch.

    The second takes the monitored value and is None for every schedule but "plateau", of which
    the first is the warm-up. After a warm-up, onecycle and cosine end with the run all the same.

    Args:
      mode: plateau: whether less or more of the monitored value is better.

    Raises:
      InputError: a onecycle that rises for exactly one step.
    """
    warmup_steps = round(config.warmup_epochs * updates_per_epoch)
    total_steps = max(1, round(epochs * updates_per_epoch) - warmup_steps)
    start = config.warmup_factor if warmup_steps else 1.0
    warmup = lr_scheduler.LinearLR(optimizer, start, total_iters=max(1, warmup_steps))
    if config.schedule == "plateau":
        return warmup, _plateau(optimizer, config, mode)
    main = _main_scheduler(optimizer, config, updates_per_epoch, total_steps)
    if warmup_steps:
        main = lr_scheduler.SequentialLR(optimizer, [warmup, main], [warmup_steps])
    return main, None


def _main_scheduler(
    optimizer: Optimizer, config: ScheduleConfig, updates_per_epoch: float, total_steps: int
) -> LRScheduler:
    def in_updates(length: float) -> int:
        return max(1, round(length * updates_per_epoch))

    if config.schedule == "step":
        return lr_scheduler.StepLR(optimizer, in_updates(config.step_epochs), config.gamma)
    if config.schedule == "multistep":
        milestones = [in_updates(m) for m in config.milestones]
        return lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, total_steps, eta_min=config.min_lr)
    if config.schedule == "onecycle":
        return _one_cycle(optimizer, config, total_steps)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _one_cycle(optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> LRScheduler:
    if config.pct_start * total_steps == 1:
        raise InputError("`pct_start`: one step of rising, where OneCycleLR divides by zero")
    return lr_scheduler.OneCycleLR(
        optimizer,
        [group["initial_lr"] for group in optimizer.param_groups],  # before the warm-up
        total_steps=total_steps,
        pct_start=config.pct_start,
        div_factor=config.div_factor,
        final_div_factor=config.final_div_factor,
        cycle_momentum=config.cycle_momentum,
    )


def _plateau(
    optimizer: Optimizer, config: ScheduleConfig, mode: Literal["min", "max"]
) -> ReduceLROnPlateau:
    return lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode,
        factor=config.gamma,
        patience=config.plateau_patience,
        threshold=config.plateau_threshold,
        cooldown=config.plateau_cooldown,
        min_lr=config.min_lr,
    )


def make_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Moving average of the weights; its BatchNorm statistics are those of the last update."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


@torch.no_grad()
def take_statistics(ema: AveragedModel, model: nn.Module) -> None:
    """Give the average BatchNorm's newest statistics: batches that only accumulate gradients
    change them without an update."""
    for averaged, newest in zip(ema.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(newest)
