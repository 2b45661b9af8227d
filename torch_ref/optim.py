"""torch.optim's optimizers and schedules from a config, and the moving average of weights."""

import dataclasses
import math
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flax_resnet.config import OptimizerConfig, ScheduleConfig
from flax_resnet.errors import InputError


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """An optimizer over the parameters of `model` that ask for a gradient.

    Raises:
      InputError: timm's LAMB without timm.
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "lamb":
        return _lamb(groups, config)
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


def _lamb(groups: list[dict], config: OptimizerConfig) -> Optimizer:
    try:
        from timm.optim import Lamb
    except ModuleNotFoundError as error:
        raise InputError(f"`optimizer` lamb needs {error.name}: install timm") from None
    return Lamb(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        max_grad_norm=config.clip_norm or None,
    )


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
    """A group for each weight decay and learning rate."""
    norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    of_norms = {id(p) for norm in norms for p in norm.parameters()}
    groups = {}
    for name, p in model.named_parameters():
        decay, lr = config.weight_decay, config.lr
        if id(p) in of_norms and config.norm_weight_decay is not None:
            decay = config.norm_weight_decay
        # Every convolution and linear weight has two dimensions or more; nothing else has.
        if p.ndim <= 1 and not config.decay_norm_and_bias:
            decay = 0.0
        if name.startswith("fc.") and config.head_lr:
            lr = config.head_lr
        if p.requires_grad:
            group = groups.setdefault((decay, lr), {"weight_decay": decay, "lr": lr, "params": []})
            group["params"].append(p)
    return list(groups.values())


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
    if config.schedule_per == "epoch":
        config = dataclasses.replace(config, schedule_per="update")
        each, plateau = make_schedulers(optimizer, config, 1, epochs, mode)
        return EveryEpoch(each, updates_per_epoch), plateau
    warmup_steps = round(config.warmup_epochs * updates_per_epoch)
    if warmup_steps and config.warmup_within:
        total_steps = round(epochs * updates_per_epoch)
        return _cosine_under_warmup(optimizer, config, warmup_steps, total_steps), None
    total_steps = max(1, round(epochs * updates_per_epoch) - warmup_steps)
    start = config.warmup_factor if warmup_steps else 1.0
    warmup = lr_scheduler.LinearLR(optimizer, start, total_iters=max(1, warmup_steps))
    if config.schedule == "plateau":
        return warmup, _plateau(optimizer, config, mode)
    main = _main_scheduler(optimizer, config, updates_per_epoch, total_steps)
    if warmup_steps:
        main = lr_scheduler.SequentialLR(optimizer, [warmup, main], [warmup_steps])
    return main, None


class EveryEpoch:
    """A scheduler that is stepped after every update and steps another one after every epoch."""

    def __init__(self, scheduler: LRScheduler, updates_per_epoch: float):
        self.scheduler, self.updates_per_epoch = scheduler, updates_per_epoch
        self.updates = self.epochs = 0

    def step(self) -> None:
        self.updates += 1
        while (self.epochs + 1) * self.updates_per_epoch <= self.updates + 1e-3:
            self.epochs += 1
            self.scheduler.step()

    def state_dict(self) -> dict:
        counts = {"updates": self.updates, "epochs": self.epochs}
        return counts | {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates, self.epochs = state["updates"], state["epochs"]
        self.scheduler.load_state_dict(state["scheduler"])


def _cosine_under_warmup(
    optimizer: Optimizer, config: ScheduleConfig, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """timm's: the warm-up takes the place of the cosine's first steps."""

    def rate(lr: float, step: int) -> float:
        if step < warmup_steps:
            return config.warmup_factor + (1 - config.warmup_factor) * step / warmup_steps
        wave = (1 + math.cos(math.pi * step / total_steps)) / 2
        return (config.min_lr + (lr - config.min_lr) * wave) / lr

    rates = [partial(rate, group["lr"]) for group in optimizer.param_groups]
    return lr_scheduler.LambdaLR(optimizer, rates)


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


def take_average(
    ema: AveragedModel, model: nn.Module, config: OptimizerConfig, update: int, copied: int = 0
) -> None:
    """Every `ema_steps`-th update enters the average; the first `copied` updates restart it."""
    if update % config.ema_steps == 0:
        ema.update_parameters(model)
    if update < copied:
        ema.n_averaged.fill_(0)


@torch.no_grad()
def take_statistics(ema: AveragedModel, model: nn.Module) -> None:
    """Give the average BatchNorm's newest statistics: batches that only accumulate gradients
    change them without an update."""
    for averaged, newest in zip(ema.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(newest)
