"""The state of a run after an epoch <-> state.pth, from which the run goes on."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flax_resnet.config import TrainConfig, differences, from_dict, to_dict
from flax_resnet.errors import InputError
from flax_resnet.text import listed
from torch_ref.checkpoint import load_content
from torch_ref.directory import STATE, replacing
from torch_ref.selection import Selection
from torch_ref.setup import Run

PROGRESS = ("epoch", "rows", "seconds", "stopped_early", "best")
"""Fields of a run that change from epoch to epoch, beside its parts and its selection."""


def save_state(run: Run, run_dir: Path) -> None:
    """Write all that the next epochs depend on."""
    content = {name: part.state_dict() for name, part in _parts(run).items()}
    content |= {name: getattr(run, name) for name in PROGRESS}
    if run.config.optimizer.accumulate_steps > 1:  # an epoch may end between two updates
        content["gradients"] = [parameter.grad for parameter in run.model.parameters()]
    content["config"] = to_dict(run.config)
    content["data"] = run.contents
    content["selection"] = dataclasses.asdict(run.selection)
    content["random"] = [torch.get_rng_state(), run.batches.generator.get_state()]
    content["cuda_random"] = torch.cuda.get_rng_state_all()
    kind, keys, *rest = np.random.get_state()  # of timm's policies, as is Python's
    content["policy_random"] = [random.getstate(), [kind, keys.tolist(), *rest]]
    with replacing(run_dir / STATE) as path, open(path, "wb") as file:
        torch.save(content, file)


def load_state(run: Run, run_dir: Path) -> None:
    """Take up what `save_state` wrote. The run then takes the steps that it would have taken
    without a break. With `num_workers` they have other random numbers: the workers are new.

    Raises:
      InputError: the file is damaged, or the run was begun with other settings.
    """
    path = run_dir / STATE
    content = load_content(path)
    try:
        begun = from_dict(content["config"])
        _check_settings(run, run_dir, begun)
        if content.get("data", run.contents) != run.contents:
            raise InputError(f"the data have changed since {run_dir} was begun")
        for name, part in _parts(run).items():
            part.load_state_dict(content[name])
        if run.config.optimizer.accumulate_steps > 1:
            _set_gradients(run.model, content["gradients"])
        for name in PROGRESS:
            setattr(run, name, content[name])
        run.selection = Selection(**content["selection"])
        cpu, batches = content["random"]
        torch.set_rng_state(cpu)
        run.batches.generator.set_state(batches)
        torch.cuda.set_rng_state_all(content["cuda_random"])
        if "policy_random" in content:  # which earlier versions did not write
            python, numpy = content["policy_random"]
            random.setstate(python)
            np.random.set_state(tuple(numpy))
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the state of this run") from error


def _set_gradients(model: nn.Module, gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def _parts(run: Run) -> dict:
    """All that has a state_dict."""
    parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
    parts |= {"plateau": run.plateau, "ema": run.ema}
    return {name: part for name, part in parts.items() if part is not None}


def _check_settings(run: Run, run_dir: Path, begun: TrainConfig) -> None:
    """Raises InputError unless the run was begun with these settings, but for two that change no
    result beyond rounding and chance."""
    data = dataclasses.replace(begun.data, num_workers=run.config.data.num_workers)
    begun = dataclasses.replace(begun, data=data, eval_batch_size=run.config.eval_batch_size)
    if other := differences(run.config, begun).values():
        raise InputError(f"{run_dir} was begun with other flags: {listed(list(other))}")
