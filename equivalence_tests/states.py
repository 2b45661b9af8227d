"""JAX's trees <-> arrays under torch's names, in torch's layouts."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet import convert
from flax_resnet.steps import TrainState


def named(tree: dict) -> dict[str, np.ndarray]:
    """Nested leaves -> arrays under torch's names."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = tuple(part.key for part in path)
        arrays[convert.torch_name(keys, leaf.ndim)] = convert.to_torch_layout(keys, leaf)
    return arrays


def filled(tree: dict, arrays: dict, kind: str = "") -> dict:
    """The inverse of `named`: the tree with other numbers; those of `name kind` if there is a
    kind. Zeros where there is no such array, as torch has no state before the first step."""

    def leaf(path, old):
        keys = tuple(part.key for part in path)
        array = arrays.get(convert.torch_name(keys, old.ndim) + kind)
        if array is None:
            return jnp.zeros_like(old)
        return jnp.array(convert.to_nnx_layout(keys, array), old.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


# Fields of Optax's states -> names of torch's.
_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"}
_KINDS = {
    "sgd": {"trace": "momentum_buffer"},
    "rmsprop": {"trace": "momentum_buffer", "mu": "grad_avg", "nu": "square_avg"},
    "adam": _ADAM,
    "adamw": _ADAM,
}


def optimizer_state(opt_state, optimizer: str) -> dict[str, np.ndarray]:
    """Optax's state under the names of `torch_side.optimizer_state`."""
    arrays = {}

    def read(kind, value):
        if kind == "step":
            arrays[kind] = np.asarray(value)
        else:
            arrays.update({f"{name} {kind}": array for name, array in named(value).items()})
        return value

    _visit(opt_state, _KINDS[optimizer], read)
    return arrays


def resumed(state: TrainState, trace: dict, optimizer: str) -> TrainState:
    """A state that goes on where a trace (torch's or ours) ended.

    Args:
      trace: its phases parameters, batch_norm and optimizer.
    """

    def write(kind, value):
        if kind == "step":
            return jnp.array(trace["optimizer"].get(kind, 0), value.dtype)
        return filled(value, trace["optimizer"], f" {kind}")

    return state._replace(
        params=filled(state.params, trace["parameters"]),
        batch_stats=filled(state.batch_stats, trace["batch_norm"]),
        opt_state=_visit(state.opt_state, _KINDS[optimizer], write),
    )


def _visit(node, kinds: dict, function):
    """The same state with `function(torch's name, value)` for every field that torch has too."""
    if not isinstance(node, tuple):
        return node
    if not hasattr(node, "_fields"):  # of a chain
        return tuple(_visit(part, kinds, function) for part in node)
    fields = {
        field: function(kinds[field], value) if field in kinds else _visit(value, kinds, function)
        for field, value in node._asdict().items()
    }
    return node._replace(**fields)
