"""Every known way in which a port differs from PyTorch, as a fault to inject by name.

    with mutants.injected(mutants.MUTANTS["biased running variance"]): ...

The suite proves itself on them: `pytest --mutant NAME` runs its unchanged tests on the faulty code,
and some test of equality has to fail (`kill_matrix.py`). A fault of a layer can also be put into
one layer of one model (`Mutant.layer`), for the localiser to find.

`difference` numbers the 33 known differences, and as 34 those of the other augmentations;
`results/kill-matrix.md` lists them.
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
"""All of them by name."""

NOT_APPLICABLE = {
    "22b": "class weights: neither side offers them, so there is nothing to put the fault into",
    "25": "step, multi-step and warm-up agree in both frameworks: a control that must not fail",
}
"""Parts of the known differences without a mutant, and why."""
