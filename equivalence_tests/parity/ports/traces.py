"""Every tensor of one step of each side, under PyTorch's names and layouts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from equivalence_tests.parity.engine import Trace
from equivalence_tests.parity.ports import draws, rules
from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.layouts import nchw
from equivalence_tests.parity.ports.mapping import Mapping
from equivalence_tests.parity.ports.walk import Walk


class Inputs(NamedTuple):
    """The numbers on which both sides run."""

    state: dict[str, np.ndarray]
    """PyTorch's parameters and statistics."""

    leaves: dict[str, np.ndarray]
    """The same numbers in JAX."""

    images: np.ndarray
    """[B, H, W, C]."""

    labels: np.ndarray
    """[B]; with one logit, 0 or 1."""

    parameters: list[str]
    """PyTorch's names of what is trained, as far as JAX has it."""

    frozen: frozenset[str] = frozenset()
    """PyTorch's names of the parameters that are not trained (requires_grad=False)."""

    def without_frozen(self, trace: Trace) -> "Inputs":
        """Without the parameters that PyTorch trains no more and to which JAX passes no gradient.

        Args:
          trace: JAX's, which loses their gradients.
        """
        gradients = trace["gradient"]
        still = [n for n in self.parameters if n not in self.frozen or gradients[n].any()]
        stopped = set(self.parameters) - set(still)
        if stopped and not gradients["images"].any():  # no gradient passes the frozen layers
            stopped.add("images")
        for name in stopped:
            del gradients[name]
        return self._replace(parameters=still)


def of_torch(graph: Graph, given: Inputs, walk: Walk, names: list[str]) -> Trace:
    """PyTorch's trace; activations are those of the walk's anchors."""
    names_held = [*graph.leaves, *given.parameters]
    leaves = {n: torch.as_tensor(given.state[n]).clone() for n in names_held}
    for name in given.parameters:
        leaves[name].requires_grad_()
    images = nchw(given.images).requires_grad_()
    start = {v: leaves[n] for n, v in graph.leaves.items()} | {graph.images: images}
    values = graph.evaluate(start, range(len(graph.operations)))
    loss = loss_of_torch(values[graph.logits], given.labels)
    sources = [*(leaves[n] for n in given.parameters), images]
    found = torch.autograd.grad(loss, sources, allow_unused=True)
    found = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]
    gradients = dict(zip([*given.parameters, "images"], found, strict=True))
    outputs = [*(step.standard for step in walk.steps[:-1]), graph.logits]
    trace = {
        "forward": dict(zip(names, (values[v] for v in outputs), strict=True)),
        "loss": {"loss": loss},
        "gradient": without_noise({n: g.numpy() for n, g in reversed(gradients.items())}),
        "batch_norm": {n: values[v] for n, v in graph.after.items()},
    }
    return _plain(trace)


def loss_of_torch(logits, labels: np.ndarray):
    """The cross-entropy; with one logit the binary one, since the other is 0 then."""
    if logits.shape[1] == 1:
        wanted = torch.from_numpy(labels).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted)
    return F.cross_entropy(logits, torch.from_numpy(labels))


def _loss_of_jax(logits, labels: np.ndarray):
    """The same loss in float64."""
    logits = logits.astype(jnp.float64)
    if logits.shape[1] == 1:
        return optax.sigmoid_binary_cross_entropy(logits[:, 0], labels).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


NOISE = 1e-13
"""Share of the largest gradient below which a gradient is rounding of 0: that of a bias before a
BatchNorm in training."""


def without_noise(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradients, with 0 in place of those that are rounding of 0."""
    norms = {name: np.linalg.norm(array) for name, array in gradients.items()}
    least = NOISE * max(norms.values(), default=0.0)
    return {n: a if norms[n] > least else np.zeros_like(a) for n, a in gradients.items()}


def _plain(trace) -> Trace:
    return {
        phase: {n: a.detach().numpy() if hasattr(a, "detach") else a for n, a in part.items()}
        for phase, part in trace.items()
        if part
    }


def of_jax(
    network, given: Inputs, walk: Walk, names: list[str], mapping: Mapping, *, train
) -> Trace:
    """JAX's trace; gradients are those of the user's function by JAX's own differentiation.

    Where the function holds narrower floats than float64 or draws, its graph takes its place.
    """
    graph = walk.subject
    forward = [step.layout.to_torch(walk.of_jax[step.subject]).numpy() for step in walk.steps[:-1]]
    forward.append(np.asarray(walk.of_jax[graph.logits]))
    through = graph.narrow or any(o.name == draws.DRAW for o in graph.operations)
    if through:
        rules.check(graph, given.leaves, jnp.asarray(given.images))
    run = _through_graph(graph) if through else network.apply
    loss, found, images = _differentiated(run, network.variables, given, train=train)
    gradients = {n: mapping.gradient(n, found, given.state[n].shape) for n in given.parameters}
    after = after_step(walk)
    moved = _moved(walk, mapping)
    statistics = {n: mapping.read(n, after, np.shape(given.state[n])) for n in moved}
    trace = {
        "forward": dict(zip(names, forward, strict=True)),
        "loss": {"loss": np.asarray(loss)},
        "gradient": without_noise(gradients | {"images": np.asarray(images).transpose(0, 3, 1, 2)}),
        "batch_norm": {n: a for n, a in statistics.items() if a is not None},
    }
    return {phase: part for phase, part in trace.items() if part}


def _differentiated(apply, variables, given: Inputs, *, train: bool):
    """The loss, and its gradients by path and for the images.

    Every operation runs by itself. JAX's gradient of a maximum looks for the values that equal it.
    A fused program computes such a value a second time with another rounding (a fused
    multiply-add), finds none, and passes no gradient: a global max-pool behind a BatchNorm loses a
    third of its gradient on a CPU.
    """
    tree = jax.tree.structure(variables)
    paths = list(given.leaves)
    floats = {p: jnp.asarray(a) for p, a in given.leaves.items()
              if jnp.issubdtype(jnp.result_type(a), jnp.floating)}  # fmt: skip

    def loss_of(part, images):
        table = given.leaves | part
        logits, _ = apply(jax.tree.unflatten(tree, [table[p] for p in paths]), images, train)
        return _loss_of_jax(logits, given.labels)

    with jax.disable_jit():
        run = jax.value_and_grad(loss_of, argnums=(0, 1))
        loss, (found, images) = run(floats, jnp.asarray(given.images))
    return loss, found, images


def _through_graph(graph: Graph):
    """The graph as a network's function; the variables after the forward pass are left out."""

    def apply(variables, images, train):
        values = dict(zip(graph.leaves.values(), jax.tree.leaves(variables), strict=True))
        values[graph.images] = images
        return graph.evaluate(values, graph.needed([graph.logits]))[graph.logits], None

    return apply


def _moved(walk: Walk, mapping: Mapping) -> set[str]:
    """PyTorch's names of what the forward pass changes on either side."""
    ours = walk.subject.moved()
    placed = {n for n, parts in mapping.pieces.items() if any(p.leaf in ours for p in parts)}
    return placed | walk.standard.moved()


def after_step(walk: Walk) -> dict:
    """JAX's leaves after the forward pass, by path."""
    graph = walk.subject
    return {
        path: walk.leaves[path] if value == graph.leaves[path] else walk.in_jax(value)
        for path, value in graph.after.items()
    }


def restricted(trace: Trace, other: Trace) -> Trace:
    """The arrays of a trace that the other has, too."""
    return {
        phase: {n: a for n, a in part.items() if n in other[phase]}
        for phase, part in trace.items()
        if phase in other
    }


def names_of(walk: Walk) -> list[str]:
    """A name for each anchor, from PyTorch's modules; the last is "logits"."""
    found = []
    for step in walk.steps[:-1]:
        operation = walk.standard.operations[step.operations[-1]] if step.operations else None
        base = (operation.module or operation.name) if operation else "images"
        count = sum(n.split(":")[0] == base for n in found)
        found.append(f"{base}:{count + 1}" if count else base)
    return [*found, "logits"]
