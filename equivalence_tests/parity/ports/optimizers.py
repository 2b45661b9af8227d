"""Compares a user's Optax optimizer with a user's PyTorch optimizer on equal gradients.

Both start from the same parameters and take the same gradients. These are random numbers: a fault
of the network does not reach the comparison. Their sizes show a limit of the gradient's norm and a
maximum over steps, and those of elements whose gradients stay small an eps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from equivalence_tests.parity.engine import Row, compare
from equivalence_tests.parity.ports import cases
from equivalence_tests.parity.ports.mapping import Mapping, put
from equivalence_tests.parity.ports.traces import Inputs
from flax_resnet.errors import InputError

SIZES = 3 * (1.0, 1e3, 1e-6, 1e-3)
"""The standard deviation of the gradients in each step. RAdam rectifies from its sixth step on."""


def rows(
    net, given: Inputs, mapping: Mapping, variables, optax_optimizer, torch_optimizer
) -> list[Row]:
    """Differences of parameters after each step, and of the optimizers' states after the last.

    Args:
      net: PyTorch's float64 network with the weights of `given`; it is trained.
      optax_optimizer: a `GradientTransformation` for the tree of JAX's parameters, in which None
        stands for every leaf that is not trained.
      torch_optimizer: (parameters) -> a PyTorch optimizer.

    Raises:
      InputError: an optimizer raises, or is none.
    """
    optimizer = _called("PyTorch", torch_optimizer, list(net.train().parameters()))
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise InputError(f"torch_optimizer returns a {kind}, no torch.optim.Optimizer")
    parameters = cases.parameters(net)
    trained = [n for n in parameters if n in mapping.pieces]
    ours = _Jax(given, mapping, variables, trained, optax_optimizer)
    got, expected = {}, {}
    rng = np.random.default_rng(0)
    spread = {n: 10 ** rng.uniform(-4, 0, parameters[n].shape) for n in trained}
    for step, size in enumerate(SIZES, 1):
        gradients = {n: size * s * rng.standard_normal(s.shape) for n, s in spread.items()}
        gradients |= {n: np.zeros(parameters[n].shape) for n in given.frozen.intersection(trained)}
        _give(net, {parameters[n]: gradients[n] for n in trained})
        ours.step(gradients)
        _called("PyTorch", optimizer.step)
        expected |= {f"{n} after step {step}": _plain(parameters[n]) for n in trained}
        got |= {f"{n} after step {step}": ours.read(n) for n in trained}
    found = compare({"parameters": got}, {"parameters": expected})
    return [*found, *_states(optimizer, parameters, ours, trained)]


def _called(side, function, *args):
    try:
        return function(*args)
    except Exception as error:  # whatever the user's own code raises
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the {side} optimizer raises {reason}") from error


def _give(net, gradients: dict):
    """Sets the gradients of PyTorch's parameters; what JAX lacks has a gradient of 0."""
    for parameter in net.parameters():
        given = gradients.get(parameter, np.zeros(parameter.shape))
        parameter.grad = torch.as_tensor(given) if parameter.requires_grad else None


def _plain(tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


class _Jax:
    """Parameters and state of the Optax optimizer."""

    def __init__(self, given: Inputs, mapping: Mapping, variables, trained, optimizer):
        self.optimizer, self.mapping, self.names = optimizer, mapping, trained
        self.shapes = {n: given.state[n].shape for n in trained}
        self.paths = list(given.leaves)
        self.tree = jax.tree.structure(variables)
        self.leaves = {piece.leaf: np.array(given.leaves[piece.leaf])
                       for n in trained for piece in mapping.pieces[n]}  # fmt: skip
        self.state = _called("Optax", optimizer.init, self._tree(self.leaves))

    def _tree(self, leaves):
        return jax.tree.unflatten(
            self.tree, [jnp.asarray(leaves[p]) if p in leaves else None for p in self.paths]
        )

    def _by_path(self, tree) -> dict:
        found = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}

    def step(self, gradients):
        given = {path: np.zeros_like(leaf) for path, leaf in self.leaves.items()}
        for name in self.names:
            for piece in self.mapping.pieces[name]:
                put(given, piece, gradients[name])
        parameters = self._tree(self.leaves)
        updates, self.state = _called(
            "Optax", self.optimizer.update, self._tree(given), self.state, parameters
        )
        self.leaves = self._by_path(optax.apply_updates(parameters, updates))

    def read(self, name) -> np.ndarray:
        return self.mapping.read(name, self.leaves, self.shapes[name])

    def states(self) -> list[dict[str, np.ndarray]]:
        """Every part of the state that has a number for each parameter, by PyTorch's names."""
        tree = jax.tree.structure(self._tree(self.leaves))
        parts = jax.tree.leaves(self.state, is_leaf=lambda x: jax.tree.structure(x) == tree)
        parts = [self._by_path(p) for p in parts if jax.tree.structure(p) == tree]
        parts = [p for p in parts if all(a.shape == self.leaves[n].shape for n, a in p.items())]
        return [{n: self.mapping.read(n, p, self.shapes[n]) for n in self.names} for p in parts]


def _states(optimizer, parameters, ours: _Jax, trained) -> list[Row]:
    """Each part of PyTorch's state beside the part of Optax's that is nearest to it."""
    kinds = {k for p in parameters.values() for k, a in optimizer.state.get(p, {}).items()
             if isinstance(a, torch.Tensor) and a.shape == p.shape and a.ndim}  # fmt: skip
    found = []
    for kind in sorted(kinds):
        names = [n for n in trained if kind in optimizer.state.get(parameters[n], {})]
        expected = {f"{n} {kind}": _plain(optimizer.state[parameters[n]][kind]) for n in names}
        choices = [
            compare({"optimizer": {f"{n} {kind}": part[n] for n in names}}, {"optimizer": expected})
            for part in ours.states()
        ]
        found += min(choices, key=_total, default=[])
    return found


def _total(part: list[Row]) -> float:
    return sum(row.norm_relative for row in part)
