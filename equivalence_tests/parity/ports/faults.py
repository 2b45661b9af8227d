"""Finds the layers that differ by themselves, and what explains each."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from equivalence_tests.parity import tolerances
from equivalence_tests.parity.ports import exported, statistics, traces, variants
from equivalence_tests.parity.ports.graph import Graph, Operation
from equivalence_tests.parity.ports.mapping import Mapping
from equivalence_tests.parity.ports.walk import Step, Walk
from flax_resnet.text import listed


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

    before: tuple[str, ...] = ()
    """Without a cause: what else PyTorch computes between the layer above and this one."""


def unshared(walk: Walk, found: list[Fault]) -> list[str]:
    """Remarks on faults without a cause whose masks of dropout are not the same, one sentence each.

    Args:
      found: of `forward` on the walk.
    """
    bare = [fault.error for fault in found if not fault.causes]
    return [
        f"the masks of dropout before {last(walk.standard.operations, step)} could not be shared:"
        f" {step.drawn.apart}"
        for step in walk.steps
        if step.error in bare and step.drawn.apart
    ]


def last(operations, step) -> str:
    """The module of the last operation above an anchor."""
    if not step.operations:
        return LOGITS
    operation = operations[step.operations[-1]]
    return operation.module or operation.name


LOGITS = "logits"
"""Stands for a module where the logits differ after the last layer."""

Changes = dict[int, list[variants.Variant]]
"""{index of an operation of PyTorch: the variants that make it JAX's}."""


def forward(
    walk: Walk, mode: str, steps: list[Step] | None = None, *, explain: bool = True
) -> tuple[list[Fault], Changes]:
    """Faults of all anchors that differ, or of the given ones.

    Args:
      explain: look for causes.
    """
    found, changes = [], {}
    for step in _differing(walk) if steps is None else steps:
        if not step.operations:
            found.append(Fault(LOGITS, mode, "forward", step.error, _after_logits(walk)))
            continue
        causes = variants.explain(walk, step, walk.of_jax[step.subject]) if explain else []
        for index, variant in causes[0].items() if causes else ():
            changes.setdefault(index, []).append(variant)
        found += _named(walk.standard.operations, step, causes, mode)
    return found, changes


def _differing(walk: Walk) -> list[Step]:
    return [step for step in walk.steps if step.error > tolerances.PORT]


FLOAT32 = 1e-6
"""Relative difference below which one side may have computed a number in float32."""


def rounded(found: list[Fault]) -> list[str]:
    """A remark on faults without a cause that float32 may explain; [] if there are none."""
    small = [fault.module for fault in found if not fault.causes and 0 < fault.error < FLOAT32]
    why = "is as small as rounding to float32, of a table of constants for example"
    return [f"the difference at {listed(dict.fromkeys(small))} {why}"] if small else []


def _after_logits(walk: Walk) -> list[str]:
    """Name the function of its logits that JAX's network returns; [] if none is known."""
    logits, end = (np.asarray(walk.of_jax[step.subject]) for step in walk.steps[-2:])
    for one in walk.steps[-1].drawn.dropouts:
        if any(variants.nearly(end, logits * one.factor(a).numpy()) for a in one.like(end.shape)):
            return [f"the network drops values of its logits at a rate of {one.rate}"]
    if permuted := _permuted(logits, end):
        return [permuted]
    functions = {"softmax": jax.nn.softmax, "log-softmax": jax.nn.log_softmax}
    names = [n for n, f in functions.items() if variants.nearly(end, np.asarray(f(logits)))]
    found = [f"the network returns the {name} of its logits" for name in names]
    factor = float((end * logits).sum() / (logits * logits).sum()) if end.size == logits.size else 0
    if variants.nearly(end, factor * logits):
        found.append(f"the network returns its logits times {factor:.6g}")
    return found


MOST_CLASSES = 8
"""Classes of another order that a line names."""


def _permuted(logits: np.ndarray, end: np.ndarray) -> str:
    """Says which classes are in another order; "" if the logits differ otherwise."""
    if logits.shape != end.shape:
        return ""
    apart = np.linalg.norm(end[:, :, None] - logits[:, None, :], axis=0)
    order = apart.argmin(1)
    if len(set(order)) < len(order) or not variants.nearly(end, logits[:, order]):
        return ""
    moved = np.flatnonzero(order != np.arange(len(order)))
    ours, theirs = ([str(i) for i in part[:MOST_CLASSES]] for part in (moved, order[moved]))
    more = f" and {len(moved) - MOST_CLASSES} more" if len(moved) > MOST_CLASSES else ""
    return (
        f"the classes are in another order: JAX's {', '.join(ours)}{more} are PyTorch's"
        f" {', '.join(theirs)}{more}"
    )


def _named(operations, step, causes, mode) -> list[Fault]:
    """One fault for each operation that has a cause; without one, for the layer of the anchor."""
    if len(causes) == 1:
        where = {i: operations[i].module or operations[i].name for i in causes[0]}
        return [
            Fault(where[i], mode, "forward", step.error, [variant.reason])
            for i, variant in causes[0].items()
        ]
    if not causes:
        return [Fault(*_place(operations, step, mode))]
    reasons = {}
    for cause in causes:
        for index, variant in cause.items():
            of_place = reasons.setdefault(operations[index].module or operations[index].name, [])
            if variant.reason not in of_place:
                of_place.append(variant.reason)
    return [Fault(name, mode, "forward", step.error, why) for name, why in reasons.items()]


def _place(operations, step, mode) -> tuple:
    """The fields of a fault without a cause."""
    name = last(operations, step)
    named = (operations[i].module or operations[i].name for i in step.operations[:-1]
             if operations[i].name not in SHAPES)  # fmt: skip
    before = tuple(n for n in dict.fromkeys(named) if n != name)
    return name, mode, "forward", step.error, [], before


SHAPES = ("view", "reshape", "flatten", "permute", "transpose", "unsqueeze", "squeeze", "expand")
"""Operations that compute nothing."""


def batch_norms(walk: Walk, mapping: Mapping, mode: str) -> tuple[list[Fault], Changes]:
    """Running statistics of each BatchNorm after a step, from the inputs that JAX's has."""
    after = traces.after_step(walk)
    wanted = walk.standard.needed(walk.standard.after.values(), walk.of_torch)
    values = walk.standard.evaluate(dict(walk.of_torch), wanted)
    names = {v: n for n, v in walk.standard.leaves.items()}
    found, changes, moved = [], {}, set(walk.standard.after.values())
    for index, operation in enumerate(walk.standard.operations):
        if operation.name != exported.BATCH_NORM or not moved.intersection(operation.outputs):
            continue
        pairs = []
        for value, new in zip(operation.inputs[-2:], operation.outputs[1:], strict=True):
            old = walk.state[names[value]]
            pairs.append((old, mapping.read(names[value], after, old.shape), values[new].numpy()))
        fault, variant = _statistics(operation, pairs, mode)
        found += fault
        changes |= {index: variant} if variant else {}
    return found, changes


def _statistics(operation: Operation, pairs, mode) -> tuple[list[Fault], list]:
    if any(got is None for _, got, _ in pairs):
        reason = "JAX keeps no running statistics here"
        return [Fault(operation.module, mode, "batch_norm", 1.0, [reason])], []
    error = max(tolerances.relative_error(got, expected) for _, got, expected in pairs)
    if error <= tolerances.PORT:
        return [], []
    causes, options = statistics.causes(*pairs, operation.options["momentum"])
    variant = [variants.Variant("", None, options)] if causes else []
    each = [[cause] for cause in causes] or [[]]  # causes that hold together, not alternatives
    return [Fault(operation.module, mode, "batch_norm", error, c) for c in each], variant


def changed(graph: Graph, changes: Changes) -> Graph:
    """PyTorch's graph with the faults of JAX put into it."""
    operations = list(graph.operations)
    for index, chosen in changes.items():
        operation, options = operations[index], {}
        for variant in chosen:
            options |= variant.options
        run: Callable = next((v.run for v in chosen if v.run), operation.run)
        if options:
            run = exported.batch_norm_of(operation, options)
        operations[index] = operation._replace(run=run)
    return graph._replace(operations=operations)


def own_parameters(walk: Walk, mapping: Mapping) -> list[Fault]:
    """Parameters that JAX's network computes with and PyTorch's has not."""
    used = {v for i in walk.subject.needed([walk.subject.logits])
            for v in walk.subject.operations[i].inputs}  # fmt: skip
    return [
        Fault(path, "evaluation", "forward", 0.0, ["JAX has a parameter that PyTorch has not"])
        for path in mapping.extra
        if walk.subject.leaves[path] in used
    ]


def with_ties(found: list[Fault], mapping: Mapping) -> list[Fault]:
    """Adds parameters that only one of the networks uses in several layers.

    They are the cause of what nothing else explains in the same layers.
    """
    reasons = {n: f"JAX uses {leaf} here, which is another layer's, too"
               for n, leaf in mapping.shared.items()}  # fmt: skip
    reasons |= {n: f"JAX has {count} parameters in place of {n}, which several layers use"
                for n, count in mapping.copies().items()}  # fmt: skip
    ties = [
        Fault(name.rpartition(".")[0] or name, "evaluation", "forward", 0.0, [reason])
        for name, reason in reasons.items()
    ]
    modules = {fault.module for fault in ties}
    return [*ties, *(f for f in found if f.causes or f.module not in modules)]


def with_reasons(found: list[Fault], reasons: dict[str, str]) -> list[Fault]:
    """The faults, those without a cause with the reason of a tensor of the same layer."""
    modules = {name.rpartition(".")[0] or name: reason for name, reason in reasons.items()}
    return [
        f if f.causes or f.module not in modules else f._replace(causes=[modules[f.module]])
        for f in found
    ]


COUNTED = "evaluation depends on a state of training that PyTorch does not have"


def counted(evaluation: Walk, training: Walk, mapping: Mapping) -> list[Fault]:
    """State that evaluation reads, that each training step changes, and that PyTorch has not.

    Equinox's BatchNorm divides its statistics by a function of the number of steps, for example.
    """
    graph, after = evaluation.subject, traces.after_step(training)
    placed = {piece.leaf for parts in mapping.pieces.values() for piece in parts}
    moved = training.subject.moved() - placed
    found = sorted(moved & graph.leaves_above(graph.logits))
    if not found:
        return []
    kept = evaluation.leaves
    leaves = kept | {p: np.asarray(after[p], kept[p].dtype) for p in found}
    start = {value: leaves[path] for path, value in graph.leaves.items()}
    start[graph.images] = evaluation.of_jax[graph.images]
    logits = graph.evaluate(start, graph.needed([graph.logits]))[graph.logits]
    error = tolerances.relative_error(logits, evaluation.of_jax[graph.logits])
    if error <= tolerances.PORT:
        return []
    return [Fault(path, "evaluation", "forward", error, [COUNTED]) for path in found]


def gradient(graph: Graph, given, walk, names, got, wrong, mode: str) -> tuple[Fault, bool]:
    """The fault of gradients that differ although every forward pass agrees.

    Args:
      graph: PyTorch's, with the causes of all other faults put into it.
      got: JAX's trace.
      wrong: rows that differ.

    Returns:
      The fault, and whether its cause explains every difference.
    """
    row = next((r for r in wrong if r.phase != "loss"), wrong[0])
    bad = {r.name for r in wrong if r.phase == "gradient"}
    if len(bad) == len(wrong):
        for module, reason, other in _without_gradients(graph, bad):
            expected = traces.of_torch(other, given, walk, names)["gradient"]
            if all(variants.nearly(array, expected[n]) for n, array in got["gradient"].items()):
                return Fault(module, mode, "gradient", row.norm_relative, [reason]), True
    module = row.name.rpartition(".")[0] or row.name
    return Fault(module, mode, row.phase, row.norm_relative, []), False


MOST_GRADIENTS = 300


def _without_gradients(graph: Graph, bad: set[str]) -> Iterator[tuple[str, str, Graph]]:
    """Graphs in which an operation passes no gradient to one of its inputs, last ones first."""
    tried = 0
    for index in reversed(graph.needed([graph.logits])):
        operation = graph.operations[index]
        name = operation.module or operation.name
        if operation.name == exported.BATCH_NORM and operation.options["training"]:
            run = exported.batch_norm_of(operation, {"by": _detached})
            yield name, "the statistics of the batch pass no gradient", _with(graph, index, run)
        for position in range(len(operation.inputs)):
            if tried < MOST_GRADIENTS and bad & _above(graph, operation.inputs[position]):
                tried += 1
                run = functools.partial(_stopped, operation.run, position)
                reason = f"no gradient passes back through {operation.name}"
                yield name, reason, _with(graph, index, run)


def _detached(x, *_):
    return (statistic.detach() for statistic in exported.batch_statistics(x))


def _above(graph: Graph, value: int) -> set[str]:
    """Names of what a gradient would reach behind a value."""
    return graph.leaves_above(value) | ({"images"} if graph.reads_images(value) else set())


def _stopped(run, position, *arrays):
    return run(*(a.detach() if i == position else a for i, a in enumerate(arrays)))


def _with(graph: Graph, index: int, run) -> Graph:
    operations = list(graph.operations)
    operations[index] = operations[index]._replace(run=run)
    return graph._replace(operations=operations)
