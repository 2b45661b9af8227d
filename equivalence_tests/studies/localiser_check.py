"""Measures how often the localiser names the right module and phase of an injected fault.

    python -m equivalence_tests.studies.localiser_check  # all; an hour on two cores
    python -m equivalence_tests.studies.localiser_check --archs resnet50  # replaces these rows

Every mutant (injected fault) of a training step is put into every layer of resnet18 that can have
it and into 20 random layers of resnet50. Compiled operations accumulate in memory, to 14 GB after
200 of 359 trials; with less memory, run one architecture at a time.

Writes results/localiser.json. Exit status 1 below 99%.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np

from equivalence_tests import mutants, results
from equivalence_tests.mutants import of_layers
from equivalence_tests.parity import engine, inputs, jax_side, localise
from flax_resnet import machine
from flax_resnet.models import layers

DRAWN = {"resnet18": None, "resnet50": 20}
"""{arch: number of random layers per mutant; None: all layers}."""

RULES = {
    "17": (dict(optimizer="adam", lr=1e-3, weight_decay=0.1), "parameters"),
    "18": (dict(optimizer="adam", lr=1e-3, weight_decay=0.1), "parameters"),
    "19": (dict(optimizer="adamw", lr=1e-3, weight_decay=0.1), "parameters"),
    # RMSprop's momentum accumulates scaled gradients, so these faults show in the optimizer state.
    "20a": (dict(optimizer="rmsprop", lr=1e-3, weight_decay=0.1), "optimizer"),
    "20b": (dict(optimizer="rmsprop", lr=1e-3, weight_decay=0.1), "optimizer"),
    "20c": (dict(optimizer="rmsprop", lr=1e-3, weight_decay=0.1), "optimizer"),
    "21": (dict(lr=1e-3, clip_norm=0.1), "optimizer"),
}
"""{difference: (rule, phase)} of optimizer mutants that the default rule hides."""


class Trial(NamedTuple):
    """A fault in one place, and the finding of the localiser."""

    arch: str

    mutant: str

    layer: str
    """Torch's name of the faulty layer; "" for a fault without a layer."""

    phase: str

    found_phase: str | None

    found_module: str | None

    causes: tuple[str, ...]

    @property
    def right(self) -> bool:
        inside = not self.layer or f"{self.found_module}.".startswith(f"{self.layer}.")
        return self.found_phase == self.phase and inside


@functools.cache
def case_of(arch: str, *, zero_init=False, rule=()) -> inputs.Case:
    return inputs.make_case(arch, zero_init=zero_init, **dict(rule))


@functools.cache
def reference(arch: str, *, zero_init=False, rule=()) -> engine.Trace:
    return engine.run_torch(case_of(arch, zero_init=zero_init, rule=rule))


def localised(mutant, arch, layer, *, edit=None, phase=None, **kind) -> Trial:
    """Runs the localiser on one faulty network; of the mutant only name and phase are used."""
    case = case_of(arch, **kind)
    got = engine.run_jax(case, edit=edit)
    finding = localise.first_divergence(got, reference(arch, **kind), case)
    found = (finding.phase, finding.module, tuple(finding.causes)) if finding else (None, None, ())
    return Trial(arch, mutant.name, layer, phase or mutant.phase, *found)


def layer_trials(arch: str, most: int | None) -> Iterator[Trial]:
    """Every mutant of a layer, in all layers or in `most` random ones."""
    rng = np.random.default_rng(0)
    model = jax_side.make_model(case_of(arch), np.float32)
    for mutant in mutants.MUTANTS.values():
        if not (mutant.layer and mutant.phase):
            continue
        names = list(mutants.eligible_layers(mutant, model))
        if most and len(names) > most:
            names = sorted(rng.choice(names, most, replace=False))
        for name in names:
            yield localised(mutant, arch, name, edit=functools.partial(_put, mutant, name))


def _put(mutant, name, model):
    mutant.layer.edit(mutants.eligible_layers(mutant, model)[name])


def pool_trial(arch: str) -> Iterator[Trial]:
    mutant = mutants.MUTANTS["SAME max-pool"]
    with mutants.injected(mutant):
        yield localised(mutant, arch, "maxpool")


def relu_trials(arch: str, most: int | None) -> Iterator[Trial]:
    """A gradient of 1/2 at zero in one ReLU, for each block whose last ReLU has inputs of 0."""
    mutant = mutants.MUTANTS["half a gradient at zero"]
    shapes = inputs.state_shapes(arch)
    for end in list(_ends_with_ties(arch, shapes))[:most]:
        calls = _calls_until(end, shapes)
        relu = _one_faulty(layers.relu, calls)
        with mock.patch.multiple(layers, relu=relu, relu_of_sum=relu):
            yield localised(mutant, arch, end, zero_init=True)


def _ends_with_ties(arch, shapes) -> Iterator[str]:
    """Last BatchNorms of blocks whose last ReLU gets inputs of exactly 0 and a gradient there.

    Branches are 0, so the shortcut has to be 0 somewhere. The next block must project: the ReLU of
    an identity block there would stop the gradient.
    """
    activations = reference(arch, zero_init=True)["forward"]
    ends = inputs.residual_ends(shapes)
    blocks = [end.rpartition(".")[0] for end in ends]
    projects = [f"{block}.downsample.0.weight" in shapes for block in blocks]
    for end, block, own, following in zip(
        ends, blocks, projects, [*projects[1:], True], strict=True
    ):
        if following and not own and (activations[block] == 0).any():
            yield end


def _calls_until(end: str, shapes) -> int:
    """Number of the ReLU call after the last BatchNorm of a block, counted from 1."""
    norms = [n for n in shapes if n.endswith("running_mean") and "downsample" not in n]
    return [n.removesuffix(".running_mean") for n in norms].index(end) + 1


def _one_faulty(relu, number):
    calls = iter(range(1, 1_000_000))
    return lambda x: (of_layers.half_at_zero if next(calls) == number else relu)(x)


def rule_trials(arch: str) -> Iterator[Trial]:
    """Faults of the loss and the optimizer, which belong to no layer."""
    for mutant in [*mutants.GROUPS["losses"], *mutants.GROUPS["optimizers"]]:
        rule, phase = RULES.get(mutant.difference, ({}, mutant.phase))
        if phase:
            with mutants.injected(mutant):
                yield localised(mutant, arch, "", phase=phase, rule=tuple(rule.items()))


def trials(arch: str) -> Iterator[Trial]:
    yield from rule_trials(arch)
    yield from pool_trial(arch)
    yield from relu_trials(arch, DRAWN[arch])
    yield from layer_trials(arch, DRAWN[arch])


def row(trial: Trial) -> dict:
    """The row of a trial; prints it too."""
    mark = "" if trial.right else "  WRONG"
    print(f"{trial.arch} {trial.mutant}: {trial.layer} -> {trial.found_phase}"
          f" {trial.found_module} {list(trial.causes)}{mark}", flush=True)  # fmt: skip
    return trial._asdict() | {"right": trial.right, "revision": machine.revision()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", nargs="+", choices=DRAWN, default=[*DRAWN])
    chosen = parser.parse_args().archs
    rows = [r for r in results.read("localiser")["trials"] if r["arch"] not in chosen]
    rows += [row(trial) for arch in chosen for trial in trials(arch)]
    results.write("localiser", {"summary": summary(rows), "trials": rows})
    return int(summary(rows)["right_share"] < 0.99)


def summary(rows: list[dict]) -> dict:
    right, explained = sum(r["right"] for r in rows), sum(bool(r["causes"]) for r in rows)
    return {
        "trials": len(rows),
        "right": right,
        "right_share": right / len(rows),
        "with_a_cause": explained,
    }


if __name__ == "__main__":
    sys.exit(main())
