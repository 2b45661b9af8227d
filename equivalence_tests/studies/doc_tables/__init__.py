"""The tables of figures in README.md and docs/, generated from the files in results/.

    python -m equivalence_tests.studies.doc_tables    # updates all pages

A page holds a table between `<!-- begin table: NAME -->` and `<!-- end table -->`.
"""

import re
from pathlib import Path

from equivalence_tests import results
from equivalence_tests.studies.doc_tables import programs, proofs, recipes, speeds

ROOT = results.FOLDER.parent
MARKED = re.compile(r"(<!-- begin table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)
TABLES = {
    function.__name__: function
    for function in (
        proofs.headline, proofs.faults_found, proofs.localiser, proofs.paired_trainings,
        proofs.error_growth, proofs.survival, proofs.ports, proofs.injected_ports, proofs.maxvit,
        speeds.speeds, speeds.gpu_speeds, speeds.gpu_bounds, speeds.gpu_ways,
        speeds.whole_trainings, speeds.decoding, speeds.members, speeds.serving,
        programs.scaling, programs.gradient_sums, programs.plan, programs.step_bytes,
        programs.step_tries, programs.compiled,
        recipes.recipes, recipes.recipes_not_run, recipes.sources, recipes.recipe_pairs,
        recipes.converted, recipes.digits, recipes.copy_cost, recipes.lossless, recipes.reencoded,
        recipes.regularization, recipes.transfer, recipes.depth,
    )
}  # fmt: skip
"""{name of a table: the function that makes it}"""


def pages() -> list[Path]:
    """Paths of README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """The text of a page with the tables between its markers generated anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)
