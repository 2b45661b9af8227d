"""Compares two networks, in evaluation and in training, and finds every layer that differs.

    compare_models(jax_net, torch_module) -> Report
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.engine import Row, compare
from equivalence_tests.parity.ports import (
    adapters,
    cases,
    exported,
    jaxpr,
    layers,
    matching,
    statistics,
    variants,
)
from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.matching import Mapping
from equivalence_tests.parity.ports.walk import Step, Walk
from flax_resnet.errors import InputError

OWN = 1e-9
"""Largest relative difference of one layer by itself, from equal inputs. Rounding gives at most
1e-13; the smallest fault that is known, an eps of 1.001e-5, gives 5e-9 and more."""

MODES = {"evaluation": False, "training": True}


class Fault(NamedTuple):
    """A layer that differs by itself."""

    module: str
    """PyTorch's name of it."""

    mode: str

    phase: str
    """"forward", "batch_norm" or "gradient"."""

    error: float

    causes: list[str]
    """Known faults, each of which gives what JAX has; [] if none does."""


class Report(NamedTuple):
    """What a comparison found."""

    verdict: str
    """"equal", "divergent", or "undecided": equal on inputs that would hide a fault."""

    faults: list[Fault]

    hidden: list[str]
    """Reasons why a fault could have been hidden."""

    rows: dict[str, list[Row]]
    """{mode: differences of all tensors}, each side running freely."""

    mapping: Mapping

    image_size: tuple[int, int]

    explained: bool
    """Whether PyTorch's network with these causes put into it computes what JAX's computes."""


class _Sides(NamedTuple):
    """Both networks in one mode, with the same numbers."""

    standard: Graph

    subject: Graph

    state: dict[str, np.ndarray]

    leaves: dict[str, np.ndarray]

    images: np.ndarray

    labels: np.ndarray


def compare_models(
    jax_net,
    torch_module: nn.Module,
    *,
    image_size: tuple[int, int] | None = None,
    batch: int = 4,
    own_weights: bool = False,
    seed: int = 0,
) -> Report:
    """Compares a JAX network of any framework with a PyTorch network, in float64.

    Args:
      jax_net: what `adapters.adapt` takes.
      torch_module: takes images `[B, C, H, W]` and returns logits `[B, K]`.
      image_size: (H, W); None: one at which no padding can hide.
      own_weights: compare with the PyTorch network's weights instead of random ones.

    Raises:
      InputError: a network cannot be followed, or raises.
    """
    rng = np.random.default_rng(seed)
    net = cases.prepared(torch_module)
    channels = cases.image_channels(net)
    size = image_size or cases.image_size(net, channels)
    shape = (batch, *size, channels)
    images = rng.standard_normal(shape)
    if not own_weights:
        cases.fill(net, images, rng)
    network = adapters.adapt(jax_net, shape)
    with jax.enable_x64(True):
        return _judge(network, net, images, rng)


def _judge(network, net, images, rng) -> Report:
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    chw = (images.shape[0], images.shape[3], *images.shape[1:3])
    standards = {mode: exported.graph(net, chw, train=t) for mode, t in MODES.items()}
    subjects = {mode: jaxpr.graph(network, images.shape, train=t) for mode, t in MODES.items()}
    evaluation = standards["evaluation"], subjects["evaluation"]
    walk = Walk(*evaluation, state, _arrays(network.variables), images)
    changed = [n for n, v in subjects["training"].leaves.items()
               if subjects["training"].after[n] != v]  # fmt: skip
    buffers = [name for name, _ in net.named_buffers()]
    parts = [layers.layers_of(g, a) for g, a in zip(evaluation, (_tensors(state), walk.leaves),
                                                    strict=True)]  # fmt: skip
    mapping = matching.match(walk, *parts, (buffers, changed))
    labels = rng.integers(0, walk.in_jax(walk.subject.logits).shape[1], len(images))
    rows, faults, runs = {}, [], {}
    for mode in MODES:
        sides = _Sides(standards[mode], subjects[mode], state, walk.leaves, images, labels)
        steps = walk if mode == "evaluation" else _followed(sides, mapping)
        found, runs[mode] = _faults(steps, mode)
        faults += found
        if mode == "training":
            faults += _statistics(steps, mapping, mode)
        rows[mode] = _rows(sides, steps, network, mapping)
    if not faults:
        faults += _gradient_faults(rows)
    hidden = cases.faults(state, evaluation[0], _all_values(evaluation[0], state, images))
    verdict = "divergent" if faults else "undecided" if hidden else "equal"
    return Report(verdict, faults, hidden, rows, mapping, images.shape[1:3], False)


def _arrays(variables) -> dict[str, np.ndarray]:
    """Leaves by path, floats in float64."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        wide = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf, np.float64) if wide else leaf
    return found


def _tensors(state):
    return {name: torch.as_tensor(array) for name, array in state.items()}


def _followed(sides: _Sides, mapping: Mapping) -> Walk:
    """A walk in training mode along the mapping that was found in evaluation mode."""
    walk = Walk(sides.standard, sides.subject, sides.state, sides.leaves, sides.images)
    standard = layers.layers_of(sides.standard, _tensors(sides.state))
    subject = layers.layers_of(sides.subject, sides.leaves)
    for stage in matching.stages(standard, subject, matching.mapped(standard, subject, mapping)):
        if stage.subject:
            walk.anchor(stage.standard[-1].output, stage.subject[-1].output)
    walk.anchor(sides.standard.logits, sides.subject.logits)
    return walk


def _faults(walk: Walk, mode: str) -> tuple[list[Fault], dict]:
    """Faults of all anchors, and the operations that replace PyTorch's to explain them."""
    faults, runs = [], {}
    for step in walk.steps:
        if step.error <= OWN:
            continue
        causes = variants.explain(walk, step, walk.of_jax[step.subject])
        runs |= causes[0].runs if causes else {}
        faults += _named(walk, step, causes, mode)
    return faults, runs


def _named(walk: Walk, step: Step, causes, mode) -> list[Fault]:
    """One fault for each layer that has a cause; without a cause, for the layer of the anchor."""
    operations = walk.standard.operations
    if not causes:
        module = operations[step.operations[-1]].module
        return [Fault(module, mode, "forward", step.error, [])]
    found = {}
    for cause in causes:
        for index, reason in cause.reasons.items():
            name = operations[index].module or operations[index].name
            found.setdefault(name, [])
            if reason not in found[name]:
                found[name].append(reason)
    return [Fault(name, mode, "forward", step.error, reasons) for name, reasons in found.items()]


def _statistics(walk: Walk, mapping: Mapping, mode: str) -> list[Fault]:
    """Running statistics of each BatchNorm after a step, from the inputs that JAX's has."""
    targets = [v for n, v in walk.subject.after.items() if v != walk.subject.leaves[n]]
    for value in targets:
        walk.in_jax(value)
    after = {n: walk.of_jax[v] if v in walk.of_jax else walk.leaves[n]
             for n, v in walk.subject.after.items()}  # fmt: skip
    values = walk.standard.evaluate(dict(walk.of_torch), walk.standard.needed(
        walk.standard.after.values(), walk.of_torch))  # fmt: skip
    faults = []
    for operation in walk.standard.operations:
        if operation.name == exported.BATCH_NORM:
            faults += _statistics_of(walk, operation, mapping, after, values, mode)
    return faults


def _statistics_of(walk, operation, mapping, after, values, mode) -> list[Fault]:
    names = {v: n for n, v in walk.standard.leaves.items()}
    pairs = []
    for value, new in zip(operation.inputs[-2:], operation.outputs[1:], strict=True):
        name = names[value]
        if name not in mapping.pieces:
            return [Fault(operation.module, mode, "batch_norm", 1.0, ["JAX keeps no such statistics"])]
        old = walk.state[name]
        pairs.append((old, mapping.read(name, after, old.shape), values[new].numpy()))
    error = max(tolerances.relative_error(got, expected) for _, got, expected in pairs)
    if error <= OWN:
        return []
    causes = statistics.causes(*pairs, operation.options["momentum"])
    return [Fault(operation.module, mode, "batch_norm", error, causes)]


def _all_values(graph: Graph, state, images, replaced=None) -> dict:
    values = {v: torch.as_tensor(state[n]) for n, v in graph.leaves.items()}
    values[graph.images] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        return graph.evaluate(values, range(len(graph.operations)), replaced)


def _rows(sides: _Sides, walk: Walk, network, mapping: Mapping) -> list[Row]:
    """Differences of all tensors, each side running freely."""
    values = _all_values(sides.standard, sides.state, sides.images)
    got, expected = {}, {}
    for step in walk.steps[:-1]:
        name = _name(sides.standard, step, expected)
        expected[name] = values[step.standard].numpy()
        got[name] = step.layout.to_torch(walk.of_jax[step.subject]).numpy()
    expected["logits"] = values[sides.standard.logits].numpy()
    got["logits"] = np.asarray(walk.of_jax[sides.subject.logits])
    train = sides.standard is not None and any(
        v != sides.standard.leaves[n] for n, v in sides.standard.after.items()
    )
    theirs, ours = _torch_gradients(sides), _jax_gradients(sides, network, mapping, train)
    trace = {"forward": got} | ours
    reference = {"forward": expected} | theirs
    if train:
        names = [n for n in sides.standard.after if n in mapping.pieces and np.ndim(sides.state[n])
                 and sides.standard.after[n] != sides.standard.leaves[n]]  # fmt: skip
        after = {n: walk.of_jax.get(v, walk.leaves[n]) for n, v in sides.subject.after.items()}
        trace["batch_norm"] = {n: mapping.read(n, after, sides.state[n].shape) for n in names}
        reference["batch_norm"] = {n: values[sides.standard.after[n]].numpy() for n in names}
    return compare(trace, reference)


def _name(graph: Graph, step: Step, taken) -> str:
    operation = graph.operations[step.operations[-1]] if step.operations else None
    base = (operation.module or operation.name) if operation else "images"
    count = sum(n.split(":")[0] == base for n in taken)
    return f"{base}:{count + 1}" if count else base


def _torch_gradients(sides: _Sides) -> dict:
    """PyTorch's loss and its gradients, by autograd through the graph."""
    graph = sides.standard
    leaves = {n: torch.as_tensor(sides.state[n]).clone() for n in graph.leaves}
    changed = {n for n, v in graph.after.items() if v != graph.leaves[n]}
    wanted = [n for n, a in leaves.items() if a.is_floating_point() and n not in changed]
    for name in wanted:
        leaves[name].requires_grad_()
    images = torch.from_numpy(sides.images).permute(0, 3, 1, 2).contiguous().requires_grad_()
    values = {v: leaves[n] for n, v in graph.leaves.items()} | {graph.images: images}
    values = graph.evaluate(values, graph.needed([graph.logits]))
    loss = F.cross_entropy(values[graph.logits], torch.from_numpy(sides.labels))
    found = torch.autograd.grad(loss, [*(leaves[n] for n in wanted), images], allow_unused=True)
    named = dict(zip([*wanted, "images"], found, strict=True))
    gradients = {n: g.numpy() for n, g in reversed(named.items()) if g is not None}
    return {"loss": {"loss": loss.detach().numpy()}, "gradient": gradients}


def _jax_gradients(sides: _Sides, network, mapping: Mapping, train: bool) -> dict:
    """JAX's loss and its gradients, by JAX's own differentiation of the user's function."""
    floats = {n for n, a in sides.leaves.items() if jnp.issubdtype(jnp.result_type(a), jnp.floating)}
    tree = jax.tree.structure(network.variables)
    paths = list(sides.subject.leaves)

    def loss_of(part, images):
        table = sides.leaves | part
        variables = jax.tree.unflatten(tree, [jnp.asarray(table[p]) if p in floats else table[p]
                                              for p in paths])  # fmt: skip
        logits, _ = network.apply(variables, images, train)
        chosen = jax.nn.log_softmax(logits.astype(jnp.float64))[np.arange(len(logits)), sides.labels]
        return -chosen.mean()

    part = {p: jnp.asarray(sides.leaves[p]) for p in floats}
    loss, (found, images) = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))(part, sides.images)
    gradients = {"images": np.asarray(images).transpose(0, 3, 1, 2)}
    for name, array in sides.state.items():
        if name in mapping.pieces:
            gradients[name] = mapping.read(name, found, array.shape)
    return {"loss": {"loss": np.asarray(loss)}, "gradient": gradients}


def _gradient_faults(rows) -> list[Fault]:
    found = []
    for mode, part in rows.items():
        for row in part:
            if row.phase in ("loss", "gradient") and row.norm_relative > OWN:
                found.append(Fault(row.name.rpartition(".")[0], mode, row.phase, row.norm_relative, []))
    return found
