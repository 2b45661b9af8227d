"""A JAX network as a graph, computed in float64 whatever types its author wrote.

One `jax.make_jaxpr` a mode gives the operations. Calls are inlined, loops of known length are
unrolled.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from equivalence_tests.parity.ports import draws, rules, written
from equivalence_tests.parity.ports.graph import Graph, Operation
from flax_resnet.errors import InputError

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_lin": "call_jaxpr",
}
"""{primitive that calls a function: its parameter with that function}."""

RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform"}
OPAQUE = {
    "while": "lax.while",
    "cond": "lax.cond",
    "xla_pmap": "jax.pmap",
    "shard_map": "jax.shard_map or jax.pmap",
}
"""{primitive: what a user calls it}."""
NARROW = written.NARROW
TYPES = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")


def graph(network, image_shape: tuple[int, ...], *, train: bool) -> Graph:
    """The graph of a network (`adapters.Network`) for images `[B, H, W, C]`.

    Raises:
      InputError: the network raises, calls the host, or holds a branch or an endless loop.
    """
    leaves = jax.tree_util.tree_flatten_with_path(network.variables)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves[0]]
    arguments = jax.tree.map(_wide, network.variables)

    def run(variables, images):
        logits, after = network.apply(variables, images, train)
        return logits, jax.tree.leaves(after)

    with jax.enable_x64(True):
        images = jax.ShapeDtypeStruct(image_shape, np.float64)
        try:
            closed = jax.make_jaxpr(run)(arguments, images)
        except InputError:
            raise
        except Exception as error:  # whatever the user's own code raises
            size = "x".join(map(str, image_shape[1:]))
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"the JAX network raises on images of {size}: {reason}") from error
    flat = _Flat()
    inputs = [flat.new() for _ in closed.jaxpr.invars]
    flat.integers = {v: a for v, (_, a) in zip(inputs, leaves[0], strict=False) if not _floats(a)}
    outputs = flat.walk(closed.jaxpr, closed.consts, inputs)
    found = Graph(
        operations=flat.operations,
        leaves=dict(zip(paths, inputs, strict=False)),
        images=inputs[-1],
        logits=outputs[0],
        after=dict(zip(paths, outputs[1:], strict=True)),
        constants=flat.constants,
        rules=tuple(flat.rules),
        narrow=flat.narrow,
    )
    _check(found, train=train)
    return found


def _floats(leaf) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def _wide(leaf):
    """The type that a leaf has in the graph: float64 in place of every float."""
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.floating):
        dtype = np.dtype(np.float64)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _check(found: Graph, *, train: bool):
    mode = "training" if train else "evaluation"
    for index in found.needed([found.logits]):
        name = found.operations[index].name
        if "callback" in name:
            raise InputError(f"the JAX network calls the host ({name}), which cannot be followed")
        if name in RANDOM or (name == draws.DRAW and not train):
            raise InputError(f"the JAX network draws random numbers in {mode} ({name})")
        if name in OPAQUE:
            raise InputError(f"the JAX network holds a {OPAQUE[name]}, which cannot be followed")


class _Flat:
    """Inlines calls into one list of operations."""

    def __init__(self):
        self.operations, self.constants, self.rules, self.narrow = [], {}, [], False
        self.integers: dict[int, object] = {}
        """The leaves that hold no floats: keys and counts, of which the keys of draws are made."""
        self._numbers = itertools.count()
        self._drawn: dict[tuple, int] = {}

    def new(self) -> int:
        return next(self._numbers)

    def constant(self, array) -> int:
        if isinstance(array, jax.core.Tracer):
            raise InputError("the JAX network uses a value that it kept from an earlier call")
        value = self.new()
        lifted = self.constants[value] = written.lifted(array)
        if lifted is not array:  # JAX's own gradients would hold the rounded number
            self.narrow |= bool(np.any(np.asarray(lifted) != np.asarray(array, np.float64)))
        return value

    def walk(self, jaxpr, consts, inputs) -> list[int]:
        """Adds the operations of a jaxpr; returns its outputs."""
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        env |= {v: self.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom):
            if isinstance(atom, core.Literal):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return env[atom]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            env.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation, inputs) -> list[int]:
        name = equation.primitive.name
        if self._draws(equation, inputs):
            return [self._draw(equation.outvars[0].aval.shape, self._known(inputs[0], fixed=False))]
        if name == "custom_vjp_call":
            self.rules.append(rules.Rule(equation, tuple(inputs)))
        if name in CALLS:
            inner = equation.params[CALLS[name]]
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
            return self.walk(jaxpr, consts, inputs)
        if name == "scan":
            return self._scan(equation.params, inputs)
        if name == "cond" and (chosen := self._known(inputs[0])) is not None:
            branches = equation.params["branches"]
            branch = branches[min(max(int(chosen), 0), len(branches) - 1)]
            return self.walk(branch.jaxpr, branch.consts, inputs[1:])
        outputs = [self.new() for _ in equation.outvars]
        self.narrow |= any(getattr(v.aval, "dtype", None) in NARROW for v in equation.outvars)
        run = _binding(equation.primitive, equation.params)
        self.operations.append(
            Operation(name, run, tuple(inputs), tuple(outputs), "", equation.params)
        )
        return outputs

    def _draws(self, equation, inputs) -> bool:
        """True of a call of `jax.random.uniform` from 0 to 1, which `bernoulli` uses, too."""
        called = equation.primitive.name in CALLS and equation.params.get("name")
        bounds = [self.constants.get(value) for value in inputs[1:]]
        return called == "_uniform" and bounds == [0.0, 1.0]

    def _draw(self, shape, key) -> int:
        """The numbers of a key; a second draw of the same key gives the same numbers."""
        output, index = self.new(), len(self.operations)
        same = (tuple(shape), output if key is None else _bits(key))
        if same in self._drawn:
            return self._drawn[same]
        self._drawn[same] = output

        def run():
            return (jnp.asarray(draws.numbers(0, index, shape=shape)),)

        self.operations.append(Operation(draws.DRAW, run, (), (output,), "", {"shape": shape}))
        return output

    def _known(self, value, *, fixed=True):
        """The array of a value that depends on constants only; None for any other.

        Args:
          fixed: False to take the integers among the leaves as they are before a step.
        """
        if value in self.constants:
            return self.constants[value]
        if not fixed and value in self.integers:
            return self.integers[value]
        operation = next((op for op in self.operations if value in op.outputs), None)
        if operation is None or operation.name == draws.DRAW:
            return None
        inputs = [self._known(v, fixed=fixed) for v in operation.inputs]
        if any(array is None for array in inputs):
            return None
        return dict(zip(operation.outputs, operation.run(*inputs), strict=True))[value]

    def _scan(self, params, inputs) -> list[int]:
        """Unrolls a loop over the first axis of its inputs."""
        body, length = params["jaxpr"], params["length"]
        first, second = params["num_consts"], params["num_consts"] + params["num_carry"]
        fixed, carry, stacked = inputs[:first], inputs[first:second], inputs[second:]
        steps = reversed(range(length)) if params["reverse"] else range(length)
        results = {}
        for step in steps:
            slices = [self._simple("index", lambda a, i=step: a[i], v) for v in stacked]
            outputs = self.walk(body.jaxpr, body.consts, [*fixed, *carry, *slices])
            carry, results[step] = outputs[: len(carry)], outputs[len(carry) :]
        columns = zip(*(results[step] for step in range(length)), strict=True)
        return [*carry, *(self._simple("stack", _stack, *column) for column in columns)]

    def _simple(self, name, function, *inputs) -> int:
        output = self.new()
        run = lambda *arrays: (function(*arrays),)  # noqa: E731
        self.operations.append(Operation(name, run, inputs, (output,)))
        return output


def _bits(key) -> bytes:
    """The bits of a random key of either form."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key).tobytes()


def _stack(*arrays):
    return jnp.stack(arrays)


def _binding(primitive, params):
    """A primitive as a function of arrays, with every float type widened to float64."""
    wide = {k: _wider(v) if k in TYPES else v for k, v in params.items()}

    def run(*arrays):
        if primitive.name == "reduce_precision":
            return arrays
        found = primitive.bind(*arrays, **wide)
        return tuple(found) if primitive.multiple_results else (found,)

    return run


def _wider(dtype):
    return np.dtype(np.float64) if dtype is not None and dtype in NARROW else dtype
