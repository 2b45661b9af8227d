"""Converts the state of an unfinished training to and from PyTorch, as a dict of arrays:

    {"model": {name: array},                     as `convert.state_dict`
     "optimizer": {"NAME momentum_buffer": array, ..., "step": array},
     "ema": {name: array},                       averaged parameters; {} without an average
     "step": int}                                batches seen

Names and layouts are torch's; `torch_ref.training_state` converts the same dict on the other side.
Learning rates are left out: both sides compute them from the schedule and the step. Cuts of the
plateau schedule are lost.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resnet.config import OptimizerConfig
from flax_resnet.errors import InputError
from flax_resnet.training.steps import TrainState
from flax_resnet.weights import convert

# {field of Optax's state: name in torch's state}
_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"}
_KINDS = {
    "sgd": {"trace": "momentum_buffer"},
    "rmsprop": {"trace": "momentum_buffer", "mu": "grad_avg", "nu": "square_avg"},
    "adam": _ADAM,
    "adamw": _ADAM,
    "lamb": _ADAM,
}


def training_arrays(state: TrainState, config: OptimizerConfig) -> dict:
    """Copies of the arrays that PyTorch needs to continue this training.

    Raises:
      InputError: gradient accumulation is pending; torch keeps its sum elsewhere.
    """
    _check_boundary(int(state.step), config, pending=getattr(state.opt_state, "mini_step", 0))
    model = named_arrays(state.params) | named_arrays(state.frozen)
    return {
        "model": model | named_arrays(state.batch_stats),
        "optimizer": optimizer_arrays(state.opt_state, config.optimizer),
        "ema": named_arrays(state.ema),
        "step": int(state.step),
    }


def load_training_arrays(state: TrainState, arrays: dict, config: OptimizerConfig) -> TrainState:
    """The state of training that these arrays hold.

    Args:
      state: a state of `steps.make_state`, for names, shapes and types.
      arrays: the dict of `training_arrays`, from either framework.

    Raises:
      InputError: entries are missing, unexpected, misshaped or non-finite (the message names all of
        them), or gradient accumulation is pending.
    """
    step = int(arrays["step"])
    _check_boundary(step, config)
    given = {part: arrays[part] for part in ("model", "optimizer", "ema")}
    if not given["optimizer"]:  # torch's optimizer has no state before the first update
        given["optimizer"] = _zeros(state, config)
    own = training_arrays(state._replace(step=0), config)
    found = [
        f"{part}: {fault}"
        for part in given
        for fault in convert.faults({n: a.shape for n, a in own[part].items()}, given[part])
    ]
    if found:
        raise InputError("the state of training does not fit: " + "; ".join(found))
    return state._replace(
        step=jnp.array(step, state.step.dtype),
        params=filled(state.params, given["model"]),
        frozen=filled(state.frozen, given["model"]),
        batch_stats=filled(state.batch_stats, given["model"]),
        opt_state=_filled_optimizer(state.opt_state, given["optimizer"], step, config),
        ema=filled(state.ema, given["ema"]),
    )


def flat(arrays: dict) -> dict[str, np.ndarray]:
    """The arrays of `training_arrays` in one flat dict, under `PART NAME`."""
    parts = {part: arrays[part] for part in ("model", "optimizer", "ema")}
    named = {f"{part} {name}": array for part in parts for name, array in parts[part].items()}
    return named | {"step": np.array(arrays["step"])}


def named_arrays(tree: dict) -> dict[str, np.ndarray]:
    """Copies of nested NNX leaves under torch's names, in torch's layouts."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = tuple(part.key for part in path)
        arrays[convert.torch_name(keys, leaf.ndim)] = convert.to_torch_layout(keys, leaf)
    return arrays


def filled(tree: dict, arrays: dict[str, np.ndarray], kind: str = "") -> dict:
    """The tree with the arrays `NAME + kind` as leaves; the inverse of `named_arrays`."""

    def leaf(path, old):
        keys = tuple(part.key for part in path)
        array = arrays[convert.torch_name(keys, old.ndim) + kind]
        return jnp.array(convert.to_nnx_layout(keys, array), old.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def optimizer_arrays(opt_state, optimizer: str) -> dict[str, np.ndarray]:
    """Optax's state as {"NAME momentum_buffer": array, ...}, with Adam's step once."""
    arrays = {}

    def read(kind, value):
        if kind == "step":
            arrays[kind] = np.array(value)
        else:
            arrays.update({f"{n} {kind}": a for n, a in named_arrays(value).items()})
        return value

    _visit(opt_state, _KINDS[optimizer], read)
    return arrays


def _filled_optimizer(opt_state, arrays, step, config):
    def write(kind, value):
        if kind == "step":
            return jnp.array(arrays[kind], value.dtype)
        return filled(value, arrays, f" {kind}")

    filled_state = _visit(opt_state, _KINDS[config.optimizer], write)
    if not isinstance(opt_state, optax.MultiStepsState):
        return filled_state
    updates = jnp.array(step // config.accumulate_steps, opt_state.gradient_step.dtype)
    return filled_state._replace(gradient_step=updates)


def _visit(node, kinds: dict, function):
    """Replace each field of Optax's state that torch has by `function(torch's name, value)`."""
    if not isinstance(node, tuple):
        return node
    if not hasattr(node, "_fields"):  # a chain of states
        return tuple(_visit(part, kinds, function) for part in node)
    fields = {
        field: function(kinds[field], value) if field in kinds else _visit(value, kinds, function)
        for field, value in node._asdict().items()
    }
    return node._replace(**fields)


def _zeros(state, config) -> dict:
    arrays = optimizer_arrays(state.opt_state, config.optimizer)
    return {name: np.zeros_like(array) for name, array in arrays.items()}


def _check_boundary(step: int, config: OptimizerConfig, pending=0):
    """Raises InputError if gradient accumulation is pending, by the step or by Optax's count."""
    if step % config.accumulate_steps or pending:
        raise InputError(
            f"step {step} is between two updates (`accumulate_steps` {config.accumulate_steps});"
            " a training converts only after a complete update"
        )
