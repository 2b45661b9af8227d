"""Networks of every JAX framework as one function and its variables."""

import inspect
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from equivalence_tests.parity import outputs
from equivalence_tests.parity.ports.frameworks import FRAMEWORKS
from flax_resnet.errors import InputError


class Network(NamedTuple):
    """A network as a pure function."""

    apply: Callable
    """`apply(variables, images [B, H, W, C], train)` -> (logits [B, K], variables after)."""
    variables: Any
    """The pytree of arrays that `apply` takes."""

    classes: int | None = None
    """K, if it is known."""


def adapt(net, image_shape: tuple[int, int, int, int], classes: Collection[int] = ()) -> Network:
    """Takes a network of any JAX framework; random weights come from the framework's own start.

    Args:
      net: an NNX, Linen, Equinox, Keras or transformers network, Haiku's transformed functions,
        `(apply, variables)`, or a `Network`. Variables, or an Equinox state, may follow in a tuple.
      image_shape: (B, H, W, C).
      classes: numbers of classes, by which one of several values is chosen as the logits.

    Raises:
      InputError: `net` is something else, or its forward pass raises or returns no logits.
    """
    network = _adapted(net, jax.ShapeDtypeStruct(image_shape, jnp.float32))
    network = network._replace(variables=jax.tree.map(_typed, network.variables))
    images = jax.ShapeDtypeStruct(image_shape, _precision(network.variables))
    while True:
        checked = _checked(network.apply, classes)
        try:
            for train in False, True:
                run = partial(checked, train=train)
                logits, _ = jax.eval_shape(run, network.variables, images)
            return Network(checked, network.variables, logits.shape[1])
        except InputError as error:
            axis = _unbound_axis(error.__cause__)
            if axis is None:
                raise
            network = network._replace(apply=_with_axis(network.apply, axis))


def _typed(leaf):
    """The same array without a weak type: a weak int32 becomes an int64 in float64's mode."""
    weak = getattr(leaf, "weak_type", False)
    return jax.lax.convert_element_type(leaf, leaf.dtype) if weak else leaf


def _precision(variables):
    """The widest floating type among the variables, at least float32."""
    leaves = jax.tree.leaves(variables)
    for leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise InputError(f"the variables hold a {type(leaf).__name__}, not only arrays")
    floats = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.result_type(jnp.float32, *floats)


def _adapted(net, images) -> Network:
    head, *rest = net if type(net) is tuple and net else (net,)  # Haiku's are named tuples
    for module, name, adapter in FRAMEWORKS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind and isinstance(head, kind):
            return _called(adapter, images, head, rest)
    if isinstance(net, Network):
        return net
    if callable(head) and len(rest) == 1:
        return Network(head, rest[0])
    found = ", ".join(type(part).__name__ for part in (head, *rest))
    raise InputError(
        f"a network is expected, not ({found}): an NNX, Linen, Equinox, Keras or transformers"
        " module, a pair of Haiku, or (apply, variables)"
    )


def _called(adapter, images, head, rest) -> Network:
    kind = type(head).__name__
    try:
        inspect.signature(adapter).bind(images, head, *rest)
    except TypeError:
        raise InputError(f"{len(rest)} values follow a {kind}, not its variables") from None
    try:
        return Network(*adapter(images, head, *rest))
    except InputError:
        raise
    except Exception as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the initialisation of {kind} raises {reason}") from error


def _unbound_axis(error) -> str | None:
    """The name of an axis over which a network reduces and which nothing binds."""
    found = re.search(r"unbound axis name: ([^\s.]+)", str(error))
    return found[1] if found and isinstance(error, NameError) else None


def _with_axis(apply, name) -> Callable:
    """Binds the name to an axis of size 1, which leaves no trace in the shapes of values."""

    def bound(variables, images, train):
        run = partial(apply, train=train)
        return jax.vmap(run, None, None, axis_name=name, axis_size=1)(variables, images)

    return bound


def _checked(apply, classes) -> Callable:
    def checked(variables, images, train):
        try:
            out = apply(variables, images, train)
        except InputError:
            raise
        except Exception as error:  # whatever the user's own code raises
            size = "x".join(map(str, images.shape))
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"the forward pass of {size} raises {reason}") from error
        if not (isinstance(out, tuple) and len(out) == 2):
            raise InputError(f"apply returns {outputs.shown(out)}, not (logits, variables after)")
        if jax.tree.structure(out[1]) != jax.tree.structure(variables):
            raise InputError("the variables after a forward pass have other parts than before it")
        given = len(images), _is_float, "the network", classes
        return outputs.logits(out[0], *given), out[1]

    return checked


def _is_float(array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))
