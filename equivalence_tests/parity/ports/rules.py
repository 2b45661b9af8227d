"""Checks the backward rules of `jax.custom_vjp`, which a graph of operations does not have."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from equivalence_tests.parity.ports.graph import Graph, Value
from flax_resnet.errors import InputError

APART = 0.1
"""Relative difference above which a rule is not the derivative. Both are computed in the types that
the author wrote, of which bfloat16 has three digits."""


class Rule(NamedTuple):
    """A call of a `jax.custom_vjp` function."""

    equation: core.JaxprEqn

    inputs: tuple[Value, ...]


def check(graph: Graph, leaves: dict, images):
    """Compares each rule with the derivative of its forward function, on the network's own numbers.

    Args:
      leaves: JAX's, by path.

    Raises:
      InputError: they differ.
    """
    values = {v: leaves[path] for path, v in graph.leaves.items()} | {graph.images: images}
    graph.evaluate(values, graph.needed(v for rule in graph.rules for v in rule.inputs))
    random, data = np.random.default_rng(0), graph.data()
    for equation, inputs in graph.rules:
        atoms = equation.invars
        arrays = [jnp.asarray(values[v], a.aval.dtype) for v, a in zip(inputs, atoms, strict=True)]
        outputs, own = jax.vjp(_alone(equation), *arrays)
        _, plain = jax.vjp(core.jaxpr_as_fun(equation.params["call_jaxpr"]), *arrays)
        weights = [jnp.asarray(random.standard_normal(y.shape), y.dtype) for y in outputs]
        for value, got, expected in zip(inputs, own(weights), plain(weights), strict=True):
            learned = value in data or graph.leaves_above(value)  # else its gradient goes nowhere
            if learned and got.dtype != jax.dtypes.float0 and _apart(got, expected):
                raise InputError(
                    "a jax.custom_vjp has a backward rule that is not the derivative of its forward"
                    " function; it cannot be followed in a network that draws or holds narrow"
                    " floats"
                )


def _alone(equation):
    """An equation as a function of its inputs."""
    variables = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal)))
    jaxpr = core.Jaxpr((), variables, equation.outvars, [equation], equation.effects)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))

    def function(*arrays):
        given = zip(equation.invars, arrays, strict=True)
        given = {v: array for v, array in given if not isinstance(v, core.Literal)}
        return run(*(given[v] for v in variables))

    return function


def _apart(got, expected) -> bool:
    got, expected = (np.asarray(a, np.float64) for a in (got, expected))
    return bool(np.linalg.norm(got - expected) > APART * np.linalg.norm(expected))
