"""The set-up of a training: network, optimizer and batches before the first step."""

import dataclasses

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from flax_resnet.config import TrainConfig
from torch_ref.augment import mixup
from torch_ref.optim import make_ema, make_optimizer, make_schedulers
from torch_ref.pipeline import loader
from torch_ref.prepare import Prepared, class_weights
from torch_ref.selection import Selection
from torch_ref.steps import memory_format, parameter_dtype


@dataclasses.dataclass(kw_only=True)
class Run:
    """A training under way: its parts and its state."""

    config: TrainConfig
    device: torch.device
    model: nn.Module
    optimizer: Optimizer

    scheduler: LRScheduler
    """Stepped after every update."""

    plateau: ReduceLROnPlateau | None
    """Stepped after every epoch; None unless `schedule` is "plateau"."""

    ema: AveragedModel | None

    class_weights: torch.Tensor | None
    """Weights of the classes in the loss, [K]."""

    copied: int
    """Updates at the start that the average copies."""

    mix: v2.Transform | None

    batches: DataLoader
    """Batches of the training."""

    splits: dict[str, DataLoader]
    """Batches of the evaluation."""

    contents: list
    """Class names, a digest of each split and weights of the classes, which a resumed run
    compares."""

    epoch: int = 0
    """Epochs done."""

    rows: list[dict] = dataclasses.field(default_factory=list)
    """Lines of metrics.csv, one for each epoch."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    """Seconds that the training of each epoch took."""

    selection: Selection = Selection()
    best: dict | None = None
    """The state of the network after the best epoch."""

    stopped_early: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the computation."""
        return getattr(torch, self.config.model.dtype)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: the average where there is one."""
        return self.ema.module if self.ema else self.model


def set_up(model: nn.Module, prepared: Prepared, device: torch.device) -> Run:
    """The network on its device, with a fresh optimizer and the batches."""
    config, rule = prepared.config, prepared.config.optimizer
    dtype = getattr(torch, config.model.dtype)
    model.to(device, parameter_dtype(dtype), memory_format=memory_format(dtype))
    batches, splits = _batches(prepared)
    optimizer = make_optimizer(model, rule)
    weights = class_weights(rule.class_weights, prepared.dataset)
    updates_per_epoch = len(batches) / rule.accumulate_steps
    scheduler, plateau = make_schedulers(
        optimizer, config.schedule, updates_per_epoch, config.epochs, config.early_stopping.mode
    )
    return Run(
        config=config,
        device=device,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        plateau=plateau,
        ema=make_ema(model, rule.ema_decay) if rule.ema_decay else None,
        class_weights=weights,
        copied=round(config.schedule.warmup_epochs * updates_per_epoch)
        if rule.ema_after_warmup
        else 0,
        mix=mixup(config.augment, config.model.num_classes),
        batches=batches,
        splits=splits,
        contents=[*prepared.dataset.contents(), None if weights is None else weights.tolist()],
    )


def _batches(prepared: Prepared) -> tuple[DataLoader, dict[str, DataLoader]]:
    config, workers = prepared.config, prepared.config.data.num_workers
    batches = loader(
        prepared.augmented,
        config.batch_size,
        seed=config.seed,
        num_workers=workers,
        balanced=config.data.sampler == "balanced",
        repeats=config.augment.repeated_augmentation,
    )
    splits = {
        name: loader(images, config.eval_batch_size, num_workers=workers)
        for name, images in prepared.dataset.splits.items()
    }
    return batches, splits
