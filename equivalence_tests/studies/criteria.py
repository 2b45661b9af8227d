"""Criteria by which other projects accept a port of a ResNet, applied to the mutants.

A mutant is a known difference between ports and PyTorch, injected as a fault. Each criterion gets
favourable conditions: the same weights and images for both sides, in float32.
"""

import functools

import numpy as np
import torch

import torch_ref
from equivalence_tests import mutants
from equivalence_tests.parity import engine, inputs
from torch_ref import checkpoint

SIZE = (47, 50)


def verdicts(chosen: list[mutants.Mutant]) -> dict[str, list[str]]:
    """{name of a mutant: the criteria that detect it}."""
    return {mutant.name: _seen(mutant) for mutant in chosen}


def _seen(mutant) -> list[str]:
    arch = _network_for(mutant)
    reference = _references(arch)
    with mutants.injected(mutant):
        return [name for name, see in CRITERIA.items() if _fails(see, arch, reference)]


def _fails(see, arch, reference) -> bool:
    try:
        return not see(arch, reference)
    except Exception:  # every criterion detects weights that cannot be loaded
        return True


def _network_for(mutant) -> str:
    """resnet18, or a network that has the part that the mutant changes."""
    needs_groups = mutant.difference in ("8a", "11b")
    return "resnext50_32x4d" if needs_groups else "resnet18"


@functools.cache
def _case(arch: str, kind: str) -> inputs.Case:
    case = inputs.make_case(arch, batch=4, size=SIZE)
    if kind == "fresh":
        torch.manual_seed(0)
        model = torch_ref.create_model(arch, inputs.NUM_CLASSES)
        arrays = checkpoint.to_arrays(model.state_dict())
        return inputs.Case(arch=arch, arrays=arrays, images=case.images, labels=case.labels)
    if kind == "ones":
        images = np.ones_like(case.images)
        return inputs.Case(arch=arch, arrays=case.arrays, images=images, labels=case.labels)
    return case


@functools.cache
def _references(arch: str) -> dict:
    runs = {k: engine.run_torch(_case(arch, k), np.float32, train=False) for k in KINDS}
    return runs | {"training": engine.run_torch(_case(arch, "random"), np.float32)}


KINDS = ("fresh", "ones", "random")


def _logits(arch, reference, kind):
    """Logits of both sides in evaluation mode."""
    got = engine.run_jax(_case(arch, kind), np.float32, train=False)
    return got["forward"]["fc"], reference[kind]["forward"]["fc"]


def fresh_weights(arch, reference) -> bool:
    """Hugging Face transformers' PyTorch-Flax tests: fresh weights, largest difference 1e-5."""
    got, expected = _logits(arch, reference, "fresh")
    return bool(np.abs(got - expected).max() <= 1e-5)


def trained_logits(arch, reference) -> bool:
    """jax-ml/bonsai, Flax's porting guide: evaluation logits of trained weights, rtol 1e-5.

    An atol of 1e-5 of the largest logit is added, because correct code would fail without it.
    """
    got, expected = _logits(arch, reference, "random")
    return bool(np.allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()))


def all_ones(arch, reference) -> bool:
    """n2cholas/jax-resnet: an image of ones, logits within 1e-4."""
    got, expected = _logits(arch, reference, "ones")
    return bool(np.abs(got - expected).max() <= 1e-4)


def mean_difference(arch, reference) -> bool:
    """matthias-wright/flaxmodels: mean absolute difference of the logits below 1e-5."""
    got, expected = _logits(arch, reference, "random")
    return bool(np.abs(got - expected).mean() < 1e-5)


def training_mode(arch, reference) -> bool:
    """samuela/torch2jax, the strictest criterion: training logits within 1e-4, running statistics
    within 1e-6 after one step."""
    got = engine.run_jax(_case(arch, "random"), np.float32)
    expected = reference["training"]
    logits = np.abs(got["forward"]["fc"] - expected["forward"]["fc"]).max() <= 1e-4
    stats = (
        np.allclose(got["batch_norm"][name], value, rtol=1e-6, atol=1e-6 * np.abs(value).max())
        for name, value in expected["batch_norm"].items()
    )
    return bool(logits) and all(stats) and trained_logits(arch, reference)


def training_loss(arch, reference) -> bool:
    """MLCommons AlgoPerf's traindiffs: the loss of training, rtol 1."""
    got = engine.run_jax(_case(arch, "random"), np.float32)
    pairs = zip(got["loss"].values(), reference["training"]["loss"].values(), strict=True)
    return all(np.allclose(a, b, rtol=1) for a, b in pairs)


CRITERIA = {
    "fresh weights 1e-5": fresh_weights,
    "trained logits 1e-5": trained_logits,
    "all-ones image 1e-4": all_ones,
    "mean difference 1e-5": mean_difference,
    "training mode 1e-4, 1e-6": training_mode,
    "training loss rtol 1": training_loss,
}
"""Each returns whether it accepts the port."""
