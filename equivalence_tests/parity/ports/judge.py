"""Compares two networks, in evaluation and in training, and finds every layer that differs.

compare_models(jax_net, torch_module) -> Report
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

from equivalence_tests.parity import sizes, tolerances
from equivalence_tests.parity.engine import Row, compare
from equivalence_tests.parity.ports import (
    adapters,
    averages,
    cases,
    conversion,
    divided,
    exported,
    faults,
    jaxpr,
    kernel_orders,
    layers,
    layouts,
    loud,
    mapping_file,
    matching,
    optimizers,
    options,
    other_axes,
    traces,
    turned,
)
from equivalence_tests.parity.ports.mapping import Mapping
from equivalence_tests.parity.ports.verdict import Report
from equivalence_tests.parity.ports.walk import Walk
from flax_resnet.errors import InputError
from flax_resnet.text import listed

MODES = {"evaluation": False, "training": True}


def compare_models(
    jax_net: Any,
    torch_module: nn.Module,
    *,
    image_size: int | Sequence[int] | None = None,
    batch: int = 5,
    own_weights: bool = False,
    converter: Callable | None = None,
    mapping: str | Path | None = None,
    optax_optimizer: optax.GradientTransformation | None = None,
    torch_optimizer: Callable | None = None,
    seed: int = 0,
) -> Report:
    """Compare a JAX network of any framework with a PyTorch network, in float64.

    Parameters need not have the same names. They are matched by the structure of the two networks
    and by their effect on the result. Both networks stay as they are.

    Args:
      jax_net: an `nnx.Module`, a Linen, Equinox, Keras or transformers network, Haiku's
        transformed functions, or a pair `(apply, variables)`.
      torch_module: a network that takes images `[B, C, H, W]` and returns logits `[B, K]`.
      image_size: (H, W), or one number for both. None chooses sizes that hide no wrong padding.
      batch: number of images. A prime number is best, because no other dimension has that size.
      own_weights: compare with the weights of the PyTorch network instead of random ones.
      converter: your own function from a state_dict to JAX's variables. It is checked that the
        function moves every number to a place of its own, and that the places are those that were
        found by matching.
      mapping: a JSON file of which tensor is which array. It is read if it exists, else written.
      optax_optimizer: a `GradientTransformation`, compared with `torch_optimizer` (`optimizers`).
      torch_optimizer: a function from parameters to a PyTorch optimizer.

    Returns:
      The verdict, and every layer that differs with its causes.

    Raises:
      InputError: a network raises an error or cannot be followed, a converter or a mapping is
        wrong, or an argument is of another kind.
    """
    options.check_networks(torch_module)
    options.check_flag("own_weights", own_weights)
    options.check_optimizers(optax_optimizer, torch_optimizer)
    file = options.mapping_file(mapping, converter)
    size, batch = options.size(image_size), options.whole("batch", batch, 1)
    rng = np.random.default_rng(options.whole("seed", seed, 0))
    net = cases.prepared(torch_module)
    shape = (batch, *cases.image_shape(net, size))
    images = rng.standard_normal(shape)
    if not own_weights:
        cases.fill(net, images, rng)
    classes = exported.classes(net, layouts.nchw(images))
    network = adapters.adapt(jax_net, shape, classes)
    with jax.enable_x64(True):
        pair = _Pair(network, net, images)
        report = pair.compared(rng, converter, file)
        if report.verdict != "divergent" and (pair.turned_error or 0) > tolerances.PORT:
            report = _turned(pair, rng) or report
        if optax_optimizer is not None:
            report = pair.with_optimizers(report, optax_optimizer, torch_optimizer)
    return report


def _turned(pair: "_Pair", rng) -> Report | None:
    """The report on images whose height and width are exchanged, if it finds a fault.

    The parameters are matched anew: a dense layer on a flattened image has another order there.
    """
    report = _Pair(pair.network, pair.net, pair.images.swapaxes(1, 2)).compared(rng)
    return report if report.verdict == "divergent" else None


class _Pair:
    """Two networks on the same images, each as a graph in both modes."""

    def __init__(self, network, net: nn.Module, images: np.ndarray):
        self.network, self.net, self.images = network, net, images
        self.leaves = _arrays(network.variables)
        batch, height, width, channels = images.shape
        self.subject = {m: jaxpr.graph(network, images.shape, train=t) for m, t in MODES.items()}
        shape, classes = (batch, channels, height, width), [network.classes]
        self.standard = {
            m: exported.graph(net, shape, train=t, classes=classes) for m, t in MODES.items()
        }
        used = {name for graph in self.standard.values() for name in graph.leaves}
        self.state, self.aliases = cases.state(net, used)
        self.walks, self.notes, self.remarks, self.elsewhere = {}, [], [], {}

    def compared(self, rng, convert=None, file: Path | None = None) -> Report:
        """Matches the parameters, and compares in both modes."""
        mapping = self.matched(convert, file)
        self.follow(mapping)
        return self.judged(mapping, rng)

    def _walk(self, mode: str) -> Walk:
        graphs = self.standard[mode], self.subject[mode]
        return Walk(*graphs, self.state, dict(self.leaves), self.images)

    def _layers(self, mode: str):
        tensors = {name: torch.as_tensor(array) for name, array in self.state.items()}
        standard = layers.layers_of(self.standard[mode], tensors)
        return standard, layers.layers_of(self.subject[mode], self.leaves)

    def matched(self, convert=None, file: Path | None = None) -> Mapping:
        """The mapping; afterwards the leaves hold PyTorch's numbers."""
        training, statistics = self.subject["training"], self._statistics()
        given = {}
        if convert:
            needed = {name for name in self.state if self._matters(name)}
            given = conversion.pieces(
                convert, self.state, self.network.variables, self.aliases, needed
            )
        elif file and file.exists():
            given = mapping_file.read(file, self.state, self.leaves)
        self._divide()
        walk, found = self._best(statistics, given)
        if convert:
            self.elsewhere = conversion.differences(given, self._best(statistics, {})[1])
            self.notes += self.elsewhere.values()
        elif file and not file.exists():
            mapping_file.write(file, found, self.state)
        self.walks["evaluation"], self.leaves = walk, walk.leaves
        self.remarks += averages.settle(training, found, self.leaves)
        return found

    def _divide(self):
        """Divides dense layers that are one on one side and several on the other."""
        standard, subject = self._layers("evaluation")
        for name, parts in matching.fused(standard, subject).items():
            for mode, graph in self.standard.items():
                self.standard[mode] = divided.in_torch(graph, name, parts)
        for leaf, parts in matching.fused(subject, standard).items():
            for mode, graph in self.subject.items():
                shape = np.shape(self.leaves[leaf])
                self.subject[mode] = divided.in_jax(graph, leaf, parts, shape)

    def _best(self, statistics, given) -> tuple[Walk, Mapping]:
        """The walk and the mapping with the least differences over the orders of tied kernels."""
        standard, subject = self._layers("evaluation")

        def attempt(pairs):
            walk = self._walk("evaluation")
            mapping = matching.match(walk, standard, subject, statistics, given, pairs)
            return sum(step.error for step in walk.steps), walk, mapping

        pairs, ties = matching.paired_kernels(standard, subject)
        best = attempt(pairs)
        for tie in ties:
            for other in matching.orders(pairs, tie) if best[0] > tolerances.PORT else ():
                tried = attempt(other)
                if tried[0] < best[0]:
                    pairs, best = other, tried
        best[2].ambiguous.extend(matching.tied(standard, ties))
        return best[1], best[2]

    def _statistics(self) -> tuple[list[str], list[str]]:
        """PyTorch's buffers, and the JAX leaves that training changes."""
        training = self.subject["training"]
        moved = training.moved()
        return [n for n, _ in self.net.named_buffers()], [p for p in training.leaves if p in moved]

    def follow(self, mapping: Mapping):
        """Walks in training mode along the mapping."""
        walk = self.walks["training"] = self._walk("training")
        standard, subject = self._layers("training")
        pairs = matching.mapped(standard, subject, mapping)
        for stage in matching.stages(standard, subject, pairs):
            matching.anchor(walk, stage, mapping)
        walk.anchor(walk.standard.logits, walk.subject.logits)
        matching.place_statistics(walk, mapping, *self._statistics())
        self.leaves = walk.leaves
        turned = kernel_orders.turned(mapping, self.state, self.leaves)
        self.remarks += turned

    def _given(self, mapping: Mapping, rng) -> traces.Inputs:
        walk = self.walks["training"]
        classes, ours = (shape[1] for shape in walk.steps[-1].shapes)
        if classes != ours:
            raise InputError(f"PyTorch's network has {classes} classes, JAX's {ours}")
        labels = rng.integers(0, max(classes, 2), len(self.images))
        trained = [name for name in cases.parameters(self.net) if name in mapping.pieces]
        frozen = {n for n, p in cases.parameters(self.net).items() if not p.requires_grad}
        given = self.state, self.leaves, self.images, labels, trained, frozenset(frozen)
        return traces.Inputs(*given)

    def judged(self, mapping: Mapping, rng) -> Report:
        self.given = self._given(mapping, rng)
        found, rows, explained = [], {}, True
        for mode, walk in self.walks.items():
            part, rows[mode], whole = _one_mode(self.network, walk, self.given, mapping, mode)
            found, explained = found + part, explained and whole
            self.remarks += faults.unshared(walk, part)
        self.remarks += self._unfrozen(rows["training"]) + faults.rounded(found)
        if found and self._results_agree(rows):
            names = listed(dict.fromkeys(fault.module for fault in found))
            self.remarks.append(f"the results agree, though activations differ at {names}")
            found, rows, explained = [], _agreeing(rows), True
        part, whole, unreached = loud.compared(
            self.walks["evaluation"], self.images, mapping, list(cases.parameters(self.net))
        )
        found, explained = found + part, explained and whole
        found = faults.with_reasons(faults.with_ties(found, mapping), self.elsewhere)
        found, homeless = self._without_counterpart(found, mapping)
        found += faults.counted(self.walks["evaluation"], self.walks["training"], mapping)
        found = other_axes.named(found, self.walks["evaluation"], mapping)
        if explained:  # every tensor agrees, so every assignment is confirmed
            mapping.ambiguous.clear()
        beside, remarks = self._beside_logits()
        self.remarks += remarks
        hidden = homeless + beside
        self.turned_error = turned.error(
            self.network, self.net, self.walks["evaluation"], self.images
        )
        hidden += self._hiding_sizes()
        hidden += cases.faults(self.state, self.standard["evaluation"], self.images)
        hidden += unreached
        verdict = "divergent" if found or self.notes else "undecided" if hidden else "equal"
        size = self.images.shape[1:3]
        return Report(verdict, found, hidden, rows, mapping, size, explained,
                      self.notes + self.remarks)  # fmt: skip

    def _without_counterpart(self, found: list[faults.Fault], mapping: Mapping):
        """The faults, and a sentence on each tensor without a counterpart that matters.

        Where both networks have such tensors, these may belong together. Nothing is known then of a
        difference without a cause, which may come of numbers in the wrong place.
        """
        homeless = [f"{n} has no place in JAX" for n in mapping.unplaced if self._matters(n)]
        own = faults.own_parameters(self.walks["evaluation"], mapping)
        if not homeless or not own:
            return found + own, homeless
        homeless += [f"JAX's {fault.module} has no place in PyTorch" for fault in own]
        return [fault for fault in found if fault.causes], homeless

    def _beside_logits(self) -> tuple[list[str], list[str]]:
        """A sentence on PyTorch's other outputs: what could hide a fault, or else a remark."""
        places = sorted({place for graph in self.standard.values() for place in graph.others})
        used = {name for graph in self.standard.values() for name in graph.leaves}
        rest = [n for n in cases.parameters(self.net) if n in self.state and n not in used]
        if not places:
            return [], []
        if not rest:
            return [], [f"PyTorch's output {listed(places)} is not compared"]
        more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
        return [f"PyTorch's output {listed(places)} is not compared, nor is {rest[0]}{more}"], []

    def _unfrozen(self, rows: list[Row]) -> list[str]:
        """A remark on parameters that PyTorch trains no more and JAX may."""
        names = [r.name for r in rows if r.phase == "gradient" and r.name in self.given.frozen]
        if not names:
            return []
        every = len(names) == len(self.given.parameters)
        which = "all parameters" if every else listed(names)
        return [f"PyTorch has frozen {which} (requires_grad=False); JAX passes gradients to them"]

    def _results_agree(self, rows: dict[str, list[Row]]) -> bool:
        """True if all but inner activations agree, and the logits at large values too: two layers
        may share out a factor otherwise."""
        results = (
            row for part in rows.values() for row in part
            if row.phase != "forward" or row.name == "logits"
        )  # fmt: skip
        agree = all(row.norm_relative <= tolerances.PORT for row in results)
        return agree and loud.logits_agree(self.walks["evaluation"], self.images)

    def _hiding_sizes(self) -> list[str]:
        """Layers whose padding could be wrong unseen at the sizes that are compared."""
        _, height, width, channels = self.images.shape
        both = [(height, width), (width, height)]
        seen = both[:1] if self.turned_error is None else both
        takes = partial(turned.takes, self.network, self.images.shape)
        return sizes.faults(self.net, seen, channels, takes) or []

    def _matters(self, name: str) -> bool:
        """True of a tensor that training changes and that the logits are computed from.

        JAX may hold a constant as a number, and need not have what nothing uses.
        """
        graphs = self.standard.values()
        learned = name in cases.parameters(self.net)
        used = any(name in graph.leaves_above(graph.logits) for graph in graphs)
        return used and (learned or name in self.standard["training"].moved())

    def with_optimizers(self, report: Report, optax_optimizer, torch_optimizer) -> Report:
        rows = optimizers.rows(
            self.net, self.given, report.mapping, self.network.variables,
            optax_optimizer, torch_optimizer,
        )  # fmt: skip
        wrong = next((row for row in rows if row.norm_relative > tolerances.PORT), None)
        report.rows["training"].extend(rows)
        if wrong is None:
            return report
        why = f"the optimizers differ, first in {wrong.name} (relative {wrong.norm_relative:.1e})"
        if wrong.phase == "optimizer":
            why += "; the parameters agree, at this learning rate"
        return report._replace(verdict="divergent", notes=[*report.notes, why])


def _arrays(variables) -> dict[str, np.ndarray]:
    """Leaves by path, floats in float64."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        wide = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf, np.float64) if wide else leaf
    return found


def _one_mode(network, walk: Walk, given: traces.Inputs, mapping: Mapping, mode: str):
    """Faults and rows of one mode, and whether the causes explain every difference."""
    found, changes = faults.forward(walk, mode)
    if MODES[mode]:
        more, others = faults.batch_norms(walk, mapping, mode)
        found += more
        for index, chosen in others.items():
            changes.setdefault(index, []).extend(chosen)
    names = traces.names_of(walk)
    got = traces.of_jax(network, given, walk, names, mapping, train=MODES[mode])
    given = given.without_frozen(got)
    rows = _rows(got, traces.of_torch(walk.standard, given, walk, names))
    # What is done to the logits after the last layer is not put into PyTorch's network.
    if not all(fault.causes and fault.module != faults.LOGITS for fault in found):
        return found, rows, False
    graph = faults.changed(walk.standard, changes)
    left = _rows(got, traces.of_torch(graph, given, walk, names)) if changes else rows
    wrong = [row for row in left if row.norm_relative > tolerances.PORT]
    if not wrong:
        return found, rows, True
    fault, whole = faults.gradient(graph, given, walk, names, got, wrong, mode)
    return [*found, fault], rows, whole


def _agreeing(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    return {
        mode: [row for row in part if row.norm_relative <= tolerances.PORT]
        for mode, part in rows.items()
    }


def _rows(got, expected) -> list[Row]:
    return compare(traces.restricted(got, expected), traces.restricted(expected, got))
