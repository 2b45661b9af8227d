"""A recipe by both `fit`s on real images, from the same weights and on the same batches, in
float64: what is left of the difference of two trainings when chance and rounding are taken away.

    python -m equivalence_tests.studies.same_recipe NAME --dataset folder:DIR --images 1280

Augmentation and dropout, which draw their own numbers in each framework, are off. Writes
results/same-RECIPE.json; exit status 1 if the weights differ by more than half the digits of
float64, or the confusion matrices of the test split do.
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
    """Both trainings and the distances between them."""
    got, expected = trajectory.both(config)
    losses = np.array([got.losses, expected.losses])
    rates = np.array([got.rates, expected.rates])
    return {
        "epochs": config.epochs,
        "steps": losses.shape[1],
        "accuracy": {k: v["accuracy"] for k, v in got.report["splits"].items()},
        "loss_differences": np.abs(losses[0] / losses[1] - 1).tolist(),
        "rate_difference": float(np.abs(rates[0] - rates[1]).max() / rates.max()),
        "weights_difference": trajectory.distance(got.weights, expected.weights),
        "confusion_matrix_equal": bool((got.confusion == expected.confusion).all()),
    }


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
    print(
        f"{args.recipe}, {row['steps']} steps: losses differ by"
        f" {max(row['loss_differences']):.1e}, weights by {row['weights_difference']:.1e},"
        f" confusion matrices {'do not' if row['confusion_matrix_equal'] else 'do'}"
    )
    return int(not (row["weights_difference"] <= BOUND and row["confusion_matrix_equal"]))


if __name__ == "__main__":
    exits.run_command(main)
