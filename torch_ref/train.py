"""Train, evaluate and keep a net in plain PyTorch.

    python -m torch_ref.train --arch resnet18 --dataset digits --run-dir runs/torch

`--help` lists every flag.
"""

import argparse
import datetime
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from torch_ref import create_model, list_models
from torch_ref.arguments import (
    BatchSize,
    Count,
    Epochs,
    Fraction,
    Limits,
    NonNegative,
    Parser,
    add_flags,
    chosen,
    reader,
)
from torch_ref.data import Data, augmented_transform, load_data, loader
from torch_ref.early_stopping import EarlyStopping
from torch_ref.evaluate import evaluate, memory_format, parameter_dtype, to_device
from torch_ref.fine_tuning import start_from
from torch_ref.optim import make_ema, make_optimizer, make_schedulers, take_statistics
from torch_ref.resnet import CIFAR
from torch_ref.run_directory import environment, keep, log
from torch_ref.steps import train_step

SMALL = 64  # pixels; of smaller images an ImageNet stem leaves hardly anything
TINY = 16  # pixels; smaller images are enlarged, and go through the ImageNet stem all the same
OWN_STEM = (*CIFAR, "basic_cnn")
Monitor = Literal["validation_loss", "validation_accuracy", "validation_f1_macro"]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: DataLoader,
    first_step: int,
    device: torch.device,
    *,
    ema: nn.Module | None = None,
    mix: nn.Module | None = None,
    **options,
) -> tuple[float, float]:
    """One pass over the training split with `options` for `train_step`; the mean loss, and the
    learning rate of the last step."""
    model.train()
    losses = []
    for step, (images, labels) in enumerate(batches, first_step):
        learning_rate = optimizer.param_groups[0]["lr"]
        images, labels = to_device(images, device, options["dtype"]), labels.to(device)
        if mix:
            images, labels = mix(images, labels)
        losses.append(train_step(model, optimizer, images, labels, step=step, **options))
        if (step + 1) % options["accumulate_steps"] == 0:
            scheduler.step()
            if ema:
                ema.update_parameters(model)
    if ema:
        take_statistics(ema, model)
    losses = torch.stack(losses).cpu()  # the only wait for the device
    if not losses.isfinite().all():
        step = first_step + losses.isfinite().logical_not().nonzero()[0].item()
        raise FloatingPointError(f"the loss of step {step} is {losses[step - first_step]}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f"the weights after step {step} are not finite")
    return losses.mean().item(), learning_rate


def fit(
    model: nn.Module,
    data: Data,
    optimizer_options: dict | None = None,
    schedule_options: dict | None = None,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
    *,
    epochs: Epochs = 16,
    batch_size: BatchSize = 128,
    eval_batch_size: BatchSize = 256,
    seed: Annotated[int, Limits(0, 2**31, without=(2**31,))] = 0,
    num_workers: Annotated[int, Limits(0, 256)] = 0,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    label_smoothing: Fraction = 0.1,
    l1: NonNegative = 0.0,
    clip_norm: NonNegative = 0.0,
    accumulate_steps: Annotated[int, Limits(1, 4096)] = 1,
    ema_decay: Fraction = 0.0,
    mixup: NonNegative = 0.0,
    patience: Count = 0,
    monitor: Monitor = "validation_loss",
    min_delta: NonNegative = 0.0,
    restore_best: bool = True,
) -> dict:
    """Trains `model` in place, leaves the best weights in it and returns the report.

    Args:
      optimizer_options, schedule_options: arguments of `make_optimizer` and `make_schedulers`.
      run_dir: where metrics.csv grows by a row an epoch; None keeps nothing.
      seed: of the order of the images; weights, augmentation and dropout draw from torch's own.
      mixup: alpha of the Beta distribution; 0 is off.

    Raises:
      ValueError: an option is out of its range.
      FloatingPointError: the loss of a step was not finite, or the weights after an epoch.
    """
    device, dtype = torch.device(device), getattr(torch, dtype)
    check(data, epochs, batch_size, accumulate_steps)
    batches = loader(data.augmented, batch_size, seed=seed, num_workers=num_workers)
    splits = {
        k: loader(v, eval_batch_size, num_workers=num_workers) for k, v in data.splits.items()
    }
    mode = "min" if monitor == "validation_loss" else "max"
    stopping = EarlyStopping(mode=mode, patience=patience, min_delta=min_delta)
    keeping = EarlyStopping(mode=mode)  # the best weights are the best by however little

    model.to(device, parameter_dtype(dtype), memory_format=memory_format(dtype))
    optimizer = make_optimizer(model, **(optimizer_options or {}))
    updates_per_epoch = len(batches) / accumulate_steps
    scheduler, plateau = make_schedulers(
        optimizer, epochs, updates_per_epoch, mode, **(schedule_options or {})
    )
    if "validation" not in splits and (patience or plateau):
        raise ValueError("early stopping and plateau watch a validation split, and there is none")
    ema = make_ema(model, ema_decay) if ema_decay else None
    options = {"dtype": dtype, "label_smoothing": label_smoothing, "l1": l1}
    options |= {"clip_norm": clip_norm, "accumulate_steps": accumulate_steps, "ema": ema}
    if mixup:
        options["mix"] = v2.MixUp(alpha=mixup, num_classes=len(data.class_names))

    evaluated, best, seconds = ema.module if ema else model, None, []
    for epoch in range(1, epochs + 1):
        epoch_started, first_step = time.perf_counter(), (epoch - 1) * len(batches)
        loss, learning_rate = train_epoch(
            model, optimizer, scheduler, batches, first_step, device, **options
        )
        seconds.append(time.perf_counter() - epoch_started)
        row = {"epoch": epoch, "learning_rate": learning_rate, "train_loss": loss}
        if "validation" in splits:
            scores = evaluate(evaluated, splits["validation"], device, dtype)
            row |= {f"validation_{name}": score for name, score in scores.items()}
            stopping = stopping.update(row[monitor], epoch)
            keeping = keeping.update(row[monitor], epoch)
            if keeping.best_epoch == epoch:
                best = {k: v.clone() for k, v in evaluated.state_dict().items()}
            if plateau:
                plateau.step(row[monitor])
        log(row, epochs, run_dir)
        if stopping.stop:
            break

    model.load_state_dict(best if best and restore_best else evaluated.state_dict())
    return {
        "splits": {k: evaluate(model, split, device, dtype) for k, split in splits.items()},
        "epochs": epoch,
        "best_epoch": keeping.best_epoch or epoch,
        "stopped_early": stopping.stop,
        "seconds": sum(seconds),  # of training; speed without the first epoch, which warms up
        "images_per_second": len(batches) * batch_size / statistics.fmean(seconds[1:] or seconds),
        "environment": environment(device),
    }


def check(data: Data, epochs: int, batch_size: int, accumulate_steps: int) -> None:
    """What torch itself would not refuse, or not with a clear word."""
    if min(epochs, batch_size, accumulate_steps) < 1:
        raise ValueError("epochs, batch_size and accumulate_steps are at least 1")
    if batch_size > len(data.augmented):
        num_images = len(data.augmented)
        raise ValueError(f"batch_size {batch_size} is more than the {num_images} training images")


def make_parser() -> Parser:
    parser = Parser(prog="torch_ref.train", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--arch", default="resnet18", help=", ".join(list_models()))
    parser.add_argument("--stem", choices=("imagenet", "cifar"), help="(by image size)")
    parser.add_argument("--shortcut", choices=("pad", "projection"), help="of the CIFAR five (pad)")
    parser.add_argument("--dropout", default=0.0, **reader(Fraction))
    parser.add_argument(
        "--zero-init-residual", action=argparse.BooleanOptionalAction, default=False
    )
    parser.add_argument("--init-from", type=Path, help="weights to start from: a file or a run")
    parser.add_argument("--run-dir", type=Path, help="a new directory (under runs/)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False)
    functions = (load_data, augmented_transform, make_optimizer, make_schedulers, fit, start_from)
    for function in functions:
        add_flags(parser, function)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Everything that the command line asks for."""
    names = ("dropout", "zero_init_residual", "shortcut")
    model_options = {name: getattr(args, name) for name in names}
    with torch.device("meta"):  # a wrong name is told before any data is read
        create_model(args.arch, stem=args.stem, **model_options)
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    run_dir = args.run_dir or Path("runs", f"torch-{args.arch}-{now}")
    if run_dir.exists():
        raise ValueError(f"run directory {run_dir} exists already")
    if args.new_head and not args.init_from:
        raise ValueError("new_head is of a fine-tuning: it needs --init-from")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is none")
    if args.deterministic and (device, args.arch) == ("cuda", "basic_cnn"):
        raise ValueError("deterministic: AdaptiveAvgPool2d of basic_cnn is not, on CUDA")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which deterministic cuBLAS needs
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic

    stem = args.stem
    open_stem = stem is None and args.arch not in OWN_STEM
    smallest = TINY if open_stem else 1
    dtype = parameter_dtype(getattr(torch, args.dtype))
    data = load_data(chosen(args, augmented_transform), smallest, dtype, **chosen(args, load_data))
    if open_stem and TINY < data.image_size < SMALL:
        stem = "cifar"
    torch.manual_seed(args.seed)
    model = create_model(
        args.arch, len(data.class_names), data.num_channels, stem=stem, **model_options
    )
    if args.init_from:
        start_from(model, args.init_from, **chosen(args, start_from))
    sizes = ", ".join(f"{name} {len(split)}" for name, split in data.splits.items())
    shape = f"{data.image_size} x {data.image_size} x {data.num_channels}"
    print(f"{args.arch}, stem {stem or 'its own'}, images {shape}: {sizes}; {device}")
    options = chosen(args, make_optimizer), chosen(args, make_schedulers)
    report = fit(model, data, *options, run_dir, device, **chosen(args, fit))

    report["command"] = shlex.join(["python", "-m", "torch_ref.train", *sys.argv[1:]])
    keep(run_dir, model, report)
    for name, scores in report["splits"].items():
        print(f"{name:10s}", *(f"{k} {v:.4f}" for k, v in scores.items()), sep="  ")
    print(run_dir)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        # The last line: a loader's worker puts its traceback before the message.
        reason = str(error).splitlines() or [type(error).__name__]
        print(f"torch_ref.train: error: {reason[-1]}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"torch_ref.train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
