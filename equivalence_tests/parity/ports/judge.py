"""Compares two networks, in evaluation and in training, and finds every layer that differs.

compare_models(jax_net, torch_module) -> Report
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from equivalence_tests.parity.engine import Row, compare
from equivalence_tests.parity.ports import (
    adapters,
    cases,
    exported,
    faults,
    jaxpr,
    layers,
    matching,
    traces,
)
from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.matching import Mapping
from equivalence_tests.parity.ports.walk import Walk

MODES = {"evaluation": False, "training": True}


class Report(NamedTuple):
    """What a comparison found."""

    verdict: str
    """"equal", "divergent", or "undecided": equal on inputs that would hide a fault."""

    faults: list[faults.Fault]

    hidden: list[str]
    """Reasons why a fault could have been hidden."""

    rows: dict[str, list[Row]]
    """{mode: differences of all tensors}, each side running freely."""

    mapping: Mapping

    image_size: tuple[int, int]

    explained: bool
    """Whether PyTorch's network with these causes put into it computes what JAX's computes."""


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
    walks = {"evaluation": Walk(standards["evaluation"], subjects["evaluation"], state,
                                _arrays(network.variables), images)}  # fmt: skip
    mapping = _matched(walks["evaluation"], subjects["training"], net)
    leaves = walks["evaluation"].leaves
    walks["training"] = Walk(standards["training"], subjects["training"], state, leaves, images)
    _follow(walks["training"], mapping)
    classes = np.shape(walks["training"].of_jax[subjects["training"].logits])[1]
    labels = rng.integers(0, classes, len(images))
    parameters = [name for name, _ in net.named_parameters() if name in mapping.pieces]
    given = traces.Inputs(state, leaves, images, labels, parameters)
    found, rows, explained = [], {}, True
    for mode, walk in walks.items():
        part, rows[mode], whole = _one_mode(network, walk, given, mapping, mode)
        found, explained = found + part, explained and whole
    hidden = cases.faults(state, standards["evaluation"], images)
    verdict = "divergent" if found else "undecided" if hidden else "equal"
    return Report(verdict, found, hidden, rows, mapping, images.shape[1:3], explained)


def _one_mode(network, walk: Walk, given, mapping, mode: str):
    """Faults and rows of one mode, and whether the causes explain every difference."""
    found, changes = faults.forward(walk, mode)
    if MODES[mode]:
        more, others = faults.batch_norms(walk, mapping, mode)
        found += more
        for index, chosen in others.items():
            changes.setdefault(index, []).extend(chosen)
    names = traces.names_of(walk)
    got = traces.of_jax(network, given, walk, names, mapping, train=MODES[mode])
    rows = _rows(got, traces.of_torch(walk.standard, given, walk, names))
    if not all(fault.causes for fault in found):
        return found, rows, False
    graph = faults.changed(walk.standard, changes)
    left = _rows(got, traces.of_torch(graph, given, walk, names)) if changes else rows
    wrong = [row for row in left if row.norm_relative > faults.OWN]
    return found + _unexplained(graph, wrong, mode), rows, not wrong


def _rows(got, expected) -> list[Row]:
    return compare(traces.restricted(got, expected), traces.restricted(expected, got))


def _unexplained(graph, wrong: list[Row], mode: str) -> list[faults.Fault]:
    """What differs although every layer's forward pass is explained: gradients."""
    if not wrong:
        return []
    row = next((r for r in wrong if r.phase != "loss"), wrong[0])
    module = row.name.rpartition(".")[0] or row.name
    return [faults.Fault(module, mode, row.phase, row.norm_relative, [])]


def _arrays(variables) -> dict[str, np.ndarray]:
    """Leaves by path, floats in float64."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        wide = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf, np.float64) if wide else leaf
    return found


def _tensors(state):
    return {name: torch.as_tensor(array) for name, array in state.items()}


def _matched(walk: Walk, training: Graph, net) -> Mapping:
    """The mapping, found on a walk in evaluation mode."""
    changed = [path for path, value in training.leaves.items() if training.after[path] != value]
    buffers = [name for name, _ in net.named_buffers()]
    standard = layers.layers_of(walk.standard, _tensors(walk.state))
    subject = layers.layers_of(walk.subject, walk.leaves)
    return matching.match(walk, standard, subject, (buffers, changed))


def _follow(walk: Walk, mapping: Mapping):
    """Walks along the mapping that was found in the other mode."""
    standard = layers.layers_of(walk.standard, _tensors(walk.state))
    subject = layers.layers_of(walk.subject, walk.leaves)
    for stage in matching.stages(standard, subject, matching.mapped(standard, subject, mapping)):
        if stage.subject:
            walk.anchor(stage.standard[-1].output, stage.subject[-1].output)
    walk.anchor(walk.standard.logits, walk.subject.logits)
