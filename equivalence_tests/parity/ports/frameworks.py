"""Each JAX framework's networks as `apply(variables, images, train)` and its variables.

A framework is recognised only if the user's code has imported it: nothing here imports it first.
"""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import ModifyScopeVariableError

from flax_resnet.errors import InputError

_IS_TRAINING = {
    "train": True, "training": True, "is_training": True, "is_train": True,
    "deterministic": False, "use_running_average": False, "inference": False, "eval": False,
}  # fmt: skip
"""Names of a flag, and its value in training."""


def _nnx(images, model):
    graph, state = nnx.split(model)
    keys, _ = nnx.split_state(state, nnx.RngState, ...)
    takes = inspect.signature(model.__call__).parameters

    def apply(state, images, train):
        model = nnx.merge(graph, state)
        _set_mode(model, train)
        keys_given = {"rngs": nnx.Rngs(0)} if "rngs" in takes else {}
        out = model(images, **keys_given, **_flags(takes, train))
        nnx.pop(model, nnx.Intermediate)  # what it sows is no state
        _, after = nnx.split_state(nnx.state(model), nnx.RngState, ...)
        return out, nnx.merge_state(after, keys)  # each step draws the same numbers

    return apply, state


def _set_mode(model, train):
    model.train() if train else model.eval()
    others = {"training": train, "is_training": train, "inference": not train}
    model.set_attributes(**others, raise_if_not_found=False)


def _linen(images, module, variables=None):
    key = jax.random.key(0)
    keys = {"params": key, "dropout": jax.random.key(1)}  # other streams take that of "params"
    takes = inspect.signature(module.__call__).parameters
    fields = [field.name for field in dataclasses.fields(module) if field.name not in takes]

    def run(method, train, *args, **settings):
        bound = getattr(module.clone(**_flags(fields, train)), method)
        return bound(*args, **settings, **_flags(takes, train))

    def apply(variables, images, train):
        others = [name for name in variables if name != "params"]
        forward = partial(run, "apply", train, variables, images, rngs=keys)
        try:  # some networks ask whether their statistics may change instead of taking a flag
            out, after = forward(mutable=others if train else [])
        except ModifyScopeVariableError:  # others write them in evaluation, too
            out, after = forward(mutable=others)
        return out, {**variables, **after}

    if variables is None:
        variables = _initialised(partial(run, "init", True), key, images)
    return apply, variables


def _transformers(images, model):
    params = model.params
    return _linen(images, model.module, params if "params" in params else {"params": params})


def _haiku(images, transformed, params=None, state=None):
    import haiku

    has_state = isinstance(transformed, haiku.TransformedWithState)
    if not has_state:
        transformed = haiku.with_empty_state(transformed)
    key = jax.random.key(0)
    takes = inspect.signature(transformed.init).parameters

    def run(function, train, *args):
        return function(*args, **_flags(takes, train))

    def apply(variables, images, train):
        out, state = run(transformed.apply, train, *variables, key, images)
        return out, (variables[0], state)

    if params is None:
        params, state = _initialised(partial(run, transformed.init, True), key, images)
    return apply, (params, state or {})


def _equinox(images, model, state=None):
    import equinox

    takes = inspect.signature(model.__call__).parameters
    keyed = "key" in takes
    parts = _parts(model)
    axis = next((part.axis_name for part in parts if hasattr(part, "axis_name")), "batch")
    has_state = state is not None or any(isinstance(p, equinox.nn.StateIndex) for p in parts)
    if has_state and state is None:
        state = equinox.nn.State(model)
    arrays, static = equinox.partition(equinox.nn.delete_init_state(model), equinox.is_array)

    def apply(variables, images, train):
        arrays, state = variables
        net = equinox.nn.inference_mode(equinox.combine(arrays, static), not train)

        def one(image, key, state):
            args = (image, state) if has_state else (image,)
            out = net(*args, **({"key": key} if keyed else {}), **_flags(takes, train))
            return out if has_state else (out, state)

        run = jax.vmap(one, in_axes=(0, 0, None), out_axes=(0, None), axis_name=axis)
        keys = jax.random.split(jax.random.key(0), len(images))
        out, state = run(jnp.moveaxis(images, -1, 1), keys, state)
        return out, (arrays, state)

    return apply, (arrays, state)


def _parts(tree) -> list:
    """The Equinox modules inside a pytree, itself among them."""
    import equinox

    def inner(node):
        return isinstance(node, equinox.Module) and node is not tree

    found = [node for node in jax.tree.leaves(tree, is_leaf=inner) if inner(node)]
    return [tree, *(part for node in found for part in _parts(node))]


def _keras(images, model):
    import keras

    if keras.backend.backend() != "jax":
        raise InputError("Keras computes with another library; set KERAS_BACKEND=jax")
    if not model.built:
        model.build(images.shape)
    parts = model.trainable_variables, model.non_trainable_variables

    def apply(variables, images, train):
        values = [[of[v.path] for v in part] for of, part in zip(variables, parts, strict=True)]
        out, after = model.stateless_call(*values, images, training=train)
        names = [v.path for v in parts[1]]
        return out, (variables[0], dict(zip(names, after, strict=True)))

    return apply, tuple({v.path: v.value for v in part} for part in parts)


FRAMEWORKS = (
    ("flax.nnx", "Module", _nnx),
    ("flax.linen", "Module", _linen),
    ("transformers.modeling_flax_utils", "FlaxPreTrainedModel", _transformers),
    ("haiku", "Transformed", _haiku),
    ("haiku", "TransformedWithState", _haiku),
    ("equinox", "Module", _equinox),
    ("keras", "Layer", _keras),
)
"""A module, the name of its class of networks, and the adapter of these."""


def _initialised(init, key, images):
    """Runs `init(key, images)`, compiled in a tenth of the time that optimising it takes, and
    without folding its constants, of which the compiler would complain."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    quick |= {"xla_disable_hlo_passes": "constant_folding"}
    return jax.jit(init, compiler_options=quick)(key, jnp.zeros(images.shape, images.dtype))


def _flags(names, train: bool) -> dict[str, bool]:
    return {name: train == value for name, value in _IS_TRAINING.items() if name in names}
