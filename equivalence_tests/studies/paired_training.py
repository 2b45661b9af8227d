"""Tests whether float32 trainings in JAX and PyTorch reach equivalent test accuracies.

    python -m equivalence_tests.studies.paired_training  # 15 minutes of a core
    python -m equivalence_tests.studies.paired_training --mutant "NAME"  # with a fault in JAX

Rounding makes float32 trainings diverge, so only their accuracies are compared: 20 pairs, two
one-sided t-tests (TOST, Schuirmann 1987). Writes results/tost.json, or tost-NAME.json with a
mutant (an injected fault). Exit status 1 if the accuracies are not equivalent.
"""

import argparse
import contextlib

import numpy as np
from scipy import stats

from equivalence_tests import mutants, results
from equivalence_tests.studies import trajectory
from equivalence_tests.studies.reproduction import LEVEL, MARGIN
from flax_resnet.commands import cli, exits

SEEDS = range(100, 120)
"""Seeds of the pairs, fixed before the first run. With five pairs the power would be 0.3."""


def accuracies(seed: int) -> tuple[float, float]:
    """Test accuracies of resnet20 on all digits: JAX, PyTorch; with equal weights and batches."""
    config = trajectory.config(
        seed=seed,
        epochs=6,
        model={"dtype": "float32"},
        data={"train_images": None, "eval_images": None},
        optimizer={"lr": 0.05},
    )
    courses = trajectory.both(config)
    ours, theirs = (course.report["splits"]["test"]["accuracy"] for course in courses)
    print(f"seed {seed}: JAX {ours:.4f}, torch {theirs:.4f}", flush=True)
    return ours, theirs


def equivalence(ours, theirs) -> dict:
    """Two one-sided paired t-tests of |mean difference| < MARGIN."""
    difference = np.subtract(ours, theirs)
    low = stats.ttest_1samp(difference, -MARGIN, alternative="greater").pvalue
    high = stats.ttest_1samp(difference, MARGIN, alternative="less").pvalue
    interval = stats.t.interval(
        1 - 2 * LEVEL, len(difference) - 1, difference.mean(), stats.sem(difference)
    )
    return {
        "mean_difference": float(difference.mean()),
        "standard_deviation": float(difference.std(ddof=1)),
        "interval_90": [float(bound) for bound in interval],
        "p_value": float(max(low, high)),
        "equivalent": bool(max(low, high) < LEVEL),
    }


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="paired_training", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mutant", default="", metavar="NAME", help="inject this fault into JAX")
    args = parser.parse_args()
    if args.mutant:
        cli.check_choice("--mutant", args.mutant, mutants.MUTANTS)
    return args


def main() -> int:
    name = parse().mutant
    fault = mutants.injected(mutants.MUTANTS[name]) if name else contextlib.nullcontext()
    with fault:
        pairs = [accuracies(seed) for seed in SEEDS]
    ours, theirs = zip(*pairs, strict=True)
    outcome = equivalence(ours, theirs)
    measured = {"margin": MARGIN, "seeds": list(SEEDS), "jax": ours, "torch": theirs}
    results.write("-".join(["tost", *name.split()]), {"mutant": name, **measured, **outcome})
    print(outcome)
    return int(not outcome["equivalent"])


if __name__ == "__main__":
    exits.run_command(main)
