"""Mutants: the known differences between ports and PyTorch, as faults to inject by name.

    with mutants.injected(mutants.MUTANTS["biased running variance"]): ...

Mutants check the suite: `pytest --mutant NAME` runs the unchanged tests on the faulty code, and
some test of equality has to fail (`studies/kill_matrix.py`). A fault of a layer can also be
injected into one layer of one model (`Mutant.layer`), for the localiser to find.

`difference` is the number of a known difference, 1 to 33; 34 stands for the other augmentations, 35
for the optimizers, losses and layers of today's recipes.
`results/kill-matrix.md` lists all of them.
"""

from equivalence_tests.mutants import of_images, of_layers, of_losses, of_optimizers, of_schedules
from equivalence_tests.mutants.mutant import LayerFault, Mutant, eligible_layers, injected

__all__ = [
    "GROUPS",
    "MUTANTS",
    "NOT_APPLICABLE",
    "LayerFault",
    "Mutant",
    "eligible_layers",
    "injected",
]

GROUPS = {
    "layers": of_layers.MUTANTS,
    "optimizers": of_optimizers.MUTANTS,
    "schedules": of_schedules.MUTANTS,
    "losses": of_losses.MUTANTS,
    "images": of_images.MUTANTS,
}

MUTANTS = {mutant.name: mutant for group in GROUPS.values() for mutant in group}
"""All mutants by name."""

NOT_APPLICABLE = {
    "25": "step, multi-step and warm-up agree in both frameworks: a control that must not fail",
}
"""Known differences without a mutant, and the reason."""
