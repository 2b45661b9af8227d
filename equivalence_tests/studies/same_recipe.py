"""A recipe by both `fit`s on real images, from the same weights and on the same batches, in
float64: what is left of the difference of two trainings when chance and rounding are taken away.

    python -m equivalence_tests.studies.same_recipe NAME --dataset folder:DIR --images 1280

Augmentation and dropout, which draw their own numbers in each framework, are off. A control shows
how fast rounding grows: JAX against JAX, with one tensor of the initial weights changed by one
rounding. The steps are judged up to the one at which the control's losses differ by more than
1e-12. There, the losses of both frameworks have to agree in half the digits of float64. If all
steps are judged, the weights have to agree so too, and the confusion matrices of the test split
have to be equal. Writes results/same-RECIPE.json; exit status 1 if they differ, or if rounding
grows so fast that fewer than two steps can be judged.
"""

import argparse
import dataclasses

import numpy as np

from equivalence_tests import results
from equivalence_tests.studies import trajectory
from flax_resnet.commands import cli, exits
from flax_resnet.config import AugmentConfig, TrainConfig
from flax_resnet.recipes import RECIPES

BOUND = float(np.sqrt(np.finfo(np.float64).eps))
"""The largest relative difference of losses and weights that counts as equal."""

GROWN = 1e-12
"""The control's relative difference of the loss from which on no step is judged. PyTorch rounds in
every operation and the control in one tensor only, so their differences are not equally large:
between GROWN and BOUND lies a factor of 15,000."""


def without_chance(name: str, dataset: str, epochs: int, images: int | None) -> TrainConfig:
    """The recipe's config, but for what is random or narrower than float64, and on a few images."""
    changes = {
        "epochs": epochs,
        "log_steps": 1,
        "model": {"dtype": "float64", "dropout": 0.0},
        "data": {"dataset": dataset, "train_images": images, "eval_images": images and images // 5},
        "parallel": {"devices": 1},
        "compilation_cache": False,
    }
    augment = AugmentConfig(random_crop=0)
    return cli.merge(dataclasses.replace(RECIPES[name].config, augment=augment), changes)


def compared(config: TrainConfig) -> dict:
    """Both trainings, the control, and the distances between them."""
    got, expected = trajectory.both(config)
    rates = np.array([got.rates, expected.rates])
    return {
        "epochs": config.epochs,
        "steps": len(got.losses),
        "accuracy": {k: v["accuracy"] for k, v in got.report["splits"].items()},
        **differences(got, expected),
        "rate_difference": float(np.abs(rates[0] - rates[1]).max() / rates.max()),
        "confusion_matrix_equal": bool((got.confusion == expected.confusion).all()),
        "control": differences(trajectory.nudged(config), got),
    }


def differences(got: trajectory.Course, expected: trajectory.Course) -> dict:
    losses = np.array([got.losses, expected.losses])
    return {
        "loss_differences": np.abs(losses[0] / losses[1] - 1).tolist(),
        "weights_difference": trajectory.distance(got.weights, expected.weights),
    }


def judge(row: dict) -> tuple[bool, str]:
    """Return whether the trainings are shown to be equal, and the reason in words."""
    grown = ~(np.array(row["control"]["loss_differences"]) <= GROWN)  # true for NaN too
    judged = int(grown.argmax()) if grown.any() else row["steps"]
    if judged < 2:
        return False, f"not decided: rounding has grown above {GROWN:.0e} in step {judged + 1}"
    largest = np.max(row["loss_differences"][:judged])  # max() would pass over what is no number
    said = f"in the first {judged} of {row['steps']} steps the losses differ by {largest:.1e}"
    equal = bool(largest <= BOUND)
    if judged == row["steps"]:
        equal &= row["weights_difference"] <= BOUND and row["confusion_matrix_equal"]
        same = "equal" if row["confusion_matrix_equal"] else "different"
        said += f", the weights by {row['weights_difference']:.1e}; confusion matrices {same}"
    else:
        said += "; after them, rounding alone grows too far"
    return equal, f"{'equal' if equal else 'different'}: {said}"


def parse() -> argparse.Namespace:
    parser = cli.Parser(prog="same_recipe", description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--dataset", required=True, metavar="DATASET")
    parser.add_argument("--epochs", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="train on so many, not on all")
    args = parser.parse_args()
    cli.check_choice("RECIPE", args.recipe, RECIPES)
    return args


def main() -> int:
    args = parse()
    row = compared(without_chance(args.recipe, args.dataset, args.epochs, args.images))
    results.write(f"same-{args.recipe}", row)
    equal, reason = judge(row)
    print(f"{args.recipe}, {reason}")
    return int(not equal)


if __name__ == "__main__":
    exits.run_command(main)
