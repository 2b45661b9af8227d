"""Train a network in plain PyTorch, evaluate it and write a run directory.

python -m torch_ref.train --arch resnet18 --dataset digits --run-dir runs/torch

The settings are those of flax-resnet train. A setting that this trainer lacks is refused if it
changes results. Weights of --init-from bring no normalisation, no sizes and no names of classes
along here.
"""

import copy
import datetime
import random
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flax_resnet.commands import cli, exits
from flax_resnet.config import TrainConfig, check_unvalidated, flat, idle
from flax_resnet.errors import InputError
from flax_resnet.text import say
from torch_ref import create_from_config, loop
from torch_ref.directory import (
    STATE,
    check_apart,
    check_usable,
    finished_report,
    locked,
    write_results,
)
from torch_ref.environment import choose_device, configure_torch
from torch_ref.prepare import Prepared, prepare
from torch_ref.report import report
from torch_ref.restore import fine_tune
from torch_ref.resume import load_state
from torch_ref.setup import set_up

LACKING = ("weights_key", "ema", "freeze_backbone", "skip_nonfinite", "on_bad_image")
"""Fields of a config that torch_ref lacks and that change the results of a run."""

WITHOUT_EFFECT = (
    "log_steps", "checkpoint_epochs", "compilation_cache", "cache", "cache_gib",
    "parallel", "devices", "shard_parameters", "reduce_dtype", "steps_per_dispatch", "kernels",
    "remat",
)  # fmt: skip
"""Fields that it lacks and that change results by rounding at most."""


def fit(
    config: TrainConfig,
    run_dir: Path | str | None = None,
    *,
    device: str | None = None,
    resume: bool = False,
    compiled: bool = False,
    command: str = "",
) -> dict:
    """Train, evaluate and write a run directory.

    Args:
      run_dir: a new directory, or that of the run to resume; None: one in runs/, named after the
        network and the time.
      device: "cpu" or "cuda"; None: CUDA where there is one.
      resume: continue the run in `run_dir` after its last whole epoch, or begin one if there is
        none. A finished run stays as it is.
      compiled: whether torch.compile compiles the network: rounding and the draws of dropout are
        others then.
      command: how it was called, for the report.

    Returns:
      The report, as in report.json.

    Raises:
      InputError: bad input, or a field of the config that torch_ref lacks; nothing is written then.
      NonFiniteLoss: names the step.
    """
    check_supported(config)
    if resume and not run_dir:
        raise InputError("`resume` needs `run_dir`, the directory of the run to continue")
    run_dir = Path(run_dir) if run_dir else _new_directory(config)
    check_usable(run_dir, resume=resume)
    check_apart(run_dir, config.data.dataset)
    device = choose_device(config, device)
    configure_torch(config)
    prepared = prepare(config)
    if "validation" not in prepared.dataset.splits:
        check_unvalidated(prepared.config)
    _announce(prepared, device)
    with locked(run_dir, resume=resume):
        values = _train(prepared, device, run_dir, compiled=compiled, command=command)
    for name, scores in values["splits"].items():
        say("  ".join([f"{name:10s}", *(f"{k} {v:.4f}" for k, v in scores.items())]))
    say(run_dir)
    return values


def _train(
    prepared: Prepared, device: torch.device, run_dir: Path, *, compiled: bool, command: str
) -> dict:
    """Begin or continue a run, and return its report."""
    begun = (run_dir / STATE).exists()
    model = _initial_model(prepared.config, prepared.dataset.channels, begun=begun)
    _check_batches(model, prepared)
    run = set_up(model, prepared, device)
    if begun:
        load_state(run, run_dir)
        if finished := finished_report(run_dir):
            say(f"{run_dir} is finished")
            return finished
        say(f"resumed after epoch {run.epoch}")
    if compiled:
        run.model.compile()
    loop.train(run, run_dir)
    values = report(run, command)
    write_results(run_dir, model, values)
    return values


def _check_batches(model: nn.Module, prepared: Prepared) -> None:
    """Raises InputError for batches that BatchNorm cannot train on: of one value a channel."""
    config, number = prepared.config, prepared.config.batch_size
    size = config.data.train_size or config.data.image_size
    if min(number, config.model.batch_norm_images or number) > 1:
        return
    shape = number, prepared.dataset.channels, size, size
    try:  # tensors on this device have no values
        copy.deepcopy(model).to("meta").train()(torch.zeros(shape, device="meta"))
    except ValueError as error:
        raise InputError(f"`batch_size` {number}, `image_size` {size}: {error}") from None


def check_supported(config: TrainConfig) -> None:
    """Raises InputError for what torch_ref cannot do, or would not do as the config says."""
    for name in _changed(config, LACKING):
        raise InputError(f"`{name}`: torch_ref has no such setting")
    if re.match(r"(torchvision|timm|hf|https?):", config.init_from or ""):
        raise InputError(
            f"`init_from` {config.init_from}: torch_ref takes files and run directories;"
            f" `flax-resnet convert {config.init_from} FILE.pth` writes a file"
        )
    if faults := idle(config):
        raise InputError("; ".join(faults.values()))


def _changed(config: TrainConfig, names: tuple[str, ...]) -> list[str]:
    """The given fields that differ from their default."""
    values, defaults = flat(config), flat(TrainConfig())
    changed = {name.rpartition(".")[2] for name in values if values[name] != defaults[name]}
    return [name for name in names if name in changed]


def _new_directory(config: TrainConfig) -> Path:
    return Path("runs", f"torch-{config.model.arch}-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def _initial_model(config: TrainConfig, in_channels: int, *, begun: bool) -> nn.Module:
    """The network with its first weights.

    Args:
      begun: true if the run has a state, whose weights replace the first.
    """
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # timm's policies draw from Python's and NumPy's generators
    np.random.seed(config.seed)
    model = create_from_config(config.model, in_channels)
    if config.init_from and not begun:
        fine_tune(model, Path(config.init_from), new_head=config.new_head)
    return model


def _announce(prepared: Prepared, device: torch.device) -> None:
    model, size = prepared.config.model, prepared.config.data.image_size
    sizes = ", ".join(f"{name} {len(split)}" for name, split in prepared.dataset.splits.items())
    shape = f"{size} x {size} x {prepared.dataset.channels}"
    say(f"{model.arch}, stem {model.stem or 'its own'}, images {shape}: {sizes}; {device}")
    if ignored := _changed(prepared.config, WITHOUT_EFFECT):
        say(f"without effect here: {', '.join(ignored)}")


def parse():
    parser = cli.Parser(prog="python -m torch_ref.train", description=__doc__)
    cli.add_starting_points(parser)
    parser.add_argument(
        "--run-dir", metavar="PATH", help="new directory (default: runs/torch-ARCH-TIME)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--compile", action="store_true", help="compile with torch.compile")
    cli.add_config_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    config = cli.build_config(args, TrainConfig())
    cli.check_start(args.recipe, config)
    try:
        fit(
            config,
            args.run_dir,
            device=args.device,
            resume=args.resume,
            compiled=args.compile,
            command=exits.command_line(),
        )
    except InputError as error:  # a loader's worker puts its traceback before the message
        raise InputError(str(error).rpartition("InputError: ")[2]) from error


if __name__ == "__main__":
    exits.run_command(main)
