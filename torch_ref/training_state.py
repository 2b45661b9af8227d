"""A training in its middle <-> a file, or plain arrays under the names of the parameters.

    {"model": {name: array},                     as a state_dict
     "optimizer": {"NAME momentum_buffer": array, ..., "step": array},
     "ema": {name: array},                       parameters; {} where there is no average
     "step": int}                                batches seen

Torch itself numbers the parameters of an optimizer, in an order that depends on its groups.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, RMSprop

from flax_resnet.errors import InputError
from torch_ref.checkpoint import load_content, to_arrays, to_tensors


def save(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer,
    ema: nn.Module | None = None,
    step: int = 0,
) -> None:
    """Writes the state_dicts of all, and the number of batches seen."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with open(path, "wb") as file:
        torch.save(content | ({"ema": ema.state_dict()} if ema else {}), file)


def load(
    path: str | os.PathLike, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None
) -> int:
    """Takes up what `save` wrote; all are changed in place. Returns the batches seen.

    Raises:
      InputError: the file is damaged, carries code or is of another training.
    """
    content = load_content(path)
    parts = {"model": model, "optimizer": optimizer} | ({"ema": ema} if ema else {})
    if not isinstance(content, Mapping) or content.keys() != parts.keys() | {"step"}:
        raise InputError(f"{path}: not a training with {', '.join(parts)} and step")
    try:
        for name, part in parts.items():
            part.load_state_dict(content[name])
        return int(content["step"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: of another training, its {name} does not fit") from error


def training_arrays(
    model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None, step: int = 0
) -> dict:
    """Copies of everything that another framework needs to go on with this training."""
    return {
        "model": to_arrays(model.state_dict()),
        "optimizer": optimizer_arrays(optimizer, dict(model.named_parameters())),
        "ema": to_arrays(averages(ema)),
        "step": step,
    }


def load_training_arrays(
    arrays: Mapping,
    model: nn.Module,
    optimizer: Optimizer,
    ema: nn.Module | None = None,
    accumulate_steps: int = 1,
) -> int:
    """The inverse of `training_arrays`; all are changed in place. Returns the batches seen.

    Raises:
      InputError: all missing, unexpected and misshaped entries; nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    expected = {
        "model": shapes(model.state_dict()),
        "optimizer": optimizer_shapes(optimizer, parameters),
        "ema": shapes(averages(ema)),
    }
    check({part: shapes(arrays[part]) for part in expected}, expected)
    updates = arrays["step"] // accumulate_steps
    model.load_state_dict(to_tensors(arrays["model"]))
    load_optimizer_arrays(arrays["optimizer"], optimizer, parameters, updates)
    if ema:
        ema.module.load_state_dict(to_tensors(arrays["model"] | arrays["ema"]))
        ema.n_averaged.fill_(updates)
    return arrays["step"]


def averages(ema: nn.Module | None) -> dict[str, Tensor]:
    """The averaged parameters that are trained, by name; {} without an average."""
    parameters = ema.module.named_parameters() if ema else ()
    return {name: p for name, p in parameters if p.requires_grad}


def optimizer_arrays(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict:
    """`layer1.0.conv1.weight momentum_buffer` and so on; Adam's `step`, the same for all, once.
    {} before the first update."""
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg" in state:  # RMSprop counts too, but never looks
            tensors["step"] = state.get("step", optimizer.param_groups[0].get("step"))
        tensors |= {
            f"{name} {kind}": value
            for kind, value in state.items()
            if kind != "step" and value is not None
        }
    return to_arrays(tensors)


def load_optimizer_arrays(
    arrays: Mapping, optimizer: Optimizer, parameters: Mapping[str, Tensor], updates: int
) -> None:
    """The inverse of `optimizer_arrays`, after `updates` updates."""
    tensors, step = to_tensors(arrays), float(arrays.get("step", updates))
    is_lamb = "trust_clip" in optimizer.param_groups[0]
    for group in optimizer.param_groups if is_lamb else ():  # LAMB counts in its groups
        group["step"] = torch.tensor(step)
    for name in trained(optimizer, parameters):
        parameter = parameters[name]
        state = {kind: tensors[f"{name} {kind}"].to(parameter) for kind in kinds(optimizer)}
        if not (is_lamb or isinstance(optimizer, SGD)):
            state["step"] = torch.tensor(step)
        optimizer.state[parameter] = state


def optimizer_shapes(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict:
    """Names and shapes of `optimizer_arrays` after the first update."""
    expected = {
        f"{name} {kind}": tuple(parameters[name].shape)
        for name in trained(optimizer, parameters)
        for kind in kinds(optimizer)
    }
    return expected | ({"step": ()} if "exp_avg" in kinds(optimizer) else {})


def trained(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> list[str]:
    """The parameters that an optimizer updates."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, parameter in parameters.items() if id(parameter) in own]


def kinds(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimizer keeps for every parameter."""
    options = optimizer.param_groups[0]
    momentum = ("momentum_buffer",) if options.get("momentum") else ()
    if isinstance(optimizer, SGD):
        return momentum
    if isinstance(optimizer, RMSprop):
        return ("square_avg", *momentum, *(("grad_avg",) if options["centered"] else ()))
    return "exp_avg", "exp_avg_sq"


def shapes(arrays: Mapping) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(array)) for name, array in arrays.items()}


def check(given: Mapping, expected: Mapping) -> None:
    """Raises InputError that names every entry in which {part: {name: shape}} differ."""
    faults = [
        f"{part}: {name} is {given[part].get(name, 'missing')}"
        f" instead of {expected[part].get(name, 'nothing')}"
        for part in expected
        for name in sorted(given[part].keys() | expected[part].keys())
        if given[part].get(name) != expected[part].get(name)
    ]
    if faults:
        raise InputError("the state of training does not fit: " + "; ".join(faults))
