"""Tables of the recipes: published figures and those reached here."""

import json

from equivalence_tests import results
from equivalence_tests.studies import reproduction_page
from equivalence_tests.studies.markdown import table
from flax_resnet.recipes import RECIPES


def recipes() -> str:
    """Published figures and ours, on whole data sets."""
    return reproduction_page.markdown(_whole_rows())


def recipes_not_run() -> str:
    """The recipes without a run on a whole data set."""
    return reproduction_page.not_run(_whole_rows())


SOURCES = {
    "resnet18-regularized-80-to-112px": "resnet18-regularized",
    "resnet18-112px-from-80px": "resnet18-48px",
    "resnet18-112px-plain-10-epochs": "resnet18-48px-plain",
    "cifar10-resnet18-64-to-80px": "cifar10-resnet18",
    "imagenette-cnn": "imagenette-cnn-plain",
    "imagenette-resnet18": "imagenette-resnet18",
    "cifar10-resnet18-dropout": "cifar10-resnet18-dropout",
    "transfer-12-epochs": "transfer-12-epochs",
    "transfer-scratch": "transfer-scratch",
    "cifar10-resnet50-64px": "cifar10-resnet50-64px",
    "cifar10-resnet101-64px-one-cycle": "cifar10-resnet101-64px",
    "cifar10-resnet20": "cifar10-resnet20",
}
"""{the recipe nearest to a published figure: the one nearest to the settings of its source}"""


def sources() -> str:
    """One line for each published figure: the recipe that comes nearest to its source."""
    ours = _whole_runs()
    header = ["recipe", "figure", "published", "reached", "nearest to the source", "seeds",
              "pixels", "minutes", "hardware"]  # fmt: skip
    rows = [_source(ours[name], faithful, ours) for name, faithful in SOURCES.items()]
    return table(header, rows)


def _source(row: dict, faithful: str, ours: dict[str, dict]) -> list[str]:
    figure, published = next(iter(row["published"].items()))
    reached = reproduction_page.reached(row["figures"][figure])
    words = [reproduction_page.marked(row), figure.replace("_", " "), f"{published:.4f}", reached]
    nearest = ours[faithful]
    same = reproduction_page.reached(nearest["figures"][figure])
    pixels = f" ({nearest['pixels']} px)" * (nearest["pixels"] != row["pixels"])
    words.append("this" if nearest is row else f"`{faithful}`{pixels}: {same}")
    return [*words, len(row["seeds"]), row["pixels"], f"{row['minutes']:.0f}", row["hardware"]]


def converted() -> str:
    """Trainings in PyTorch whose weights were converted and evaluated in JAX."""
    rows = []
    for path in sorted(results.FOLDER.glob("recipes/*/seed*-torch/in-jax.json")):
        folder = path.parent
        torch = json.loads((folder / "report.json").read_text())["splits"]["test"]
        jax = json.loads(path.read_text())
        cells = [f"{each[name]:.4f}" for name in ("accuracy", "loss") for each in (torch, jax)]
        seed = folder.name.removeprefix("seed").removesuffix("-torch")
        rows.append([f"`{folder.parent.name}`", seed, *cells])
    header = ["recipe", "seed", "test accuracy, PyTorch", "JAX", "test loss, PyTorch", "JAX"]
    return table(header, rows, numbers=4)


def digits() -> str:
    """Folds and ensembles on the digits: the runs alone, and all of them together."""
    header = ["epochs", "runs", "accuracy of each alone", "together", "loss of each alone",
              "together"]  # fmt: skip
    rows = []
    for epochs, found in results.read("digits")["epochs"].items():
        folds, seeds = found["folds"], found["ensemble"]
        alone = _together(folds["alone"], folds["pooled"])
        rows.append([epochs, "5 folds, all predictions together", *alone])
        alone = _together(seeds["alone"], seeds["mean"])
        rows.append([epochs, "5 seeds, mean of probabilities", *alone])
    return table(header, rows, numbers=4)


def copy_cost() -> str:
    """Folds on lossless images and on their JPEG copies."""
    header = ["seed", "images", "accuracy of each fold", "together", "loss of each fold",
              "together", "correct from these alone"]  # fmt: skip
    rows = [
        [seed, kind, *_together(found[kind]["alone"], found[kind]["pooled"]),
         found[f"right_in_{kind}_alone"]]
        for seed, found in results.read("copy-cost")["seeds"].items()
        for kind in ("lossless", "jpeg")
    ]  # fmt: skip
    return table(header, rows, numbers=5)


def lossless() -> str:
    """Networks that were trained on JPEG files, on the lossless images and on JPEG files."""
    header = ["recipe", "images", "accuracy, lossless", "JPEG", "p", "loss, lossless", "JPEG",
              "added loss"]  # fmt: skip
    rows = [
        [f"`{name}`", row["images"], f"{row['lossless_accuracy']:.4f}",
         f"{row['jpeg_accuracy']:.4f}", f"{row['p']:.2f}", f"{row['lossless_loss']:.3f}",
         f"{row['jpeg_loss']:.3f}", f"{row['added_loss']:.3f} ± {row['added_loss_error']:.3f}"]
        for name, row in results.read("lossless")["rows"].items()
    ]  # fmt: skip
    return table(header, rows, numbers=7)


def reencoded() -> str:
    """Trainings on all images of a copy in JPEG files, and on the same images compressed more."""
    header = ["quality of the second encoding", "mean change, levels", "test accuracy",
              "test loss"]  # fmt: skip
    found = results.read("reencoded")["rows"].items()
    rows = [
        ["none" if quality == "None" else quality, f"{row['levels']:.1f}",
         *(f"{row['splits']['test'][figure]:.4f}" for figure in ("accuracy", "loss"))]
        for quality, row in sorted(found, key=lambda item: item[1]["levels"])
    ]  # fmt: skip
    return table(header, rows, numbers=3)


def _together(alone: list[dict], whole: dict) -> list[str]:
    """Lowest and highest figure of the runs alone, and the figure of all, for both figures."""
    cells = []
    for figure in ("accuracy", "loss"):
        values = [row[figure] for row in alone]
        cells += [f"{min(values):.4f} to {max(values):.4f}", f"{whole[figure]:.4f}"]
    return cells


def regularization() -> str:
    """The accuracies of regularised networks and of plain ones."""
    return _question(
        "resnet18-regularized", "resnet18-regularized-base", "resnet18-regularized-decay",
        "resnet18-regularized-7x7", "resnet18-regularized-base-7x7",
        "resnet18-regularized-decay-7x7", "resnet18-regularized-32-to-80px",
        "resnet18-regularized-80px-sgd", "resnet18-regularized-sgd", "resnet18-regularized-80px",
        "resnet18-regularized-80-to-112px", "resnet18-224", "resnet18-224-plain", "resnet18-48px",
        "resnet18-48-to-80px", "resnet18-80-to-112px", "resnet18-80px", "resnet18-112px",
        "resnet18-112px-from-80px", "resnet18-48px-plain", "resnet18-112px-plain",
        "resnet18-112px-plain-batch-32", "resnet18-112px-plain-10-epochs",
        "cifar10-resnet18-dropout", "imagenette-cnn", "imagenette-cnn-plain", "cifar10-resnet18",
        "cifar10-resnet18-64px",
    )  # fmt: skip


def transfer() -> str:
    """The accuracies of fine-tuned networks and of those from random weights."""
    return _question(
        "transfer-source", "transfer", "transfer-12-epochs", "transfer-scratch",
        "cifar10-resnet18-64px",
    )  # fmt: skip


def depth() -> str:
    """The accuracies of networks of different depth."""
    he = (f"cifar10-resnet{layers}" for layers in (20, 32, 44, 56, 110))
    return _question(
        "imagenette-cnn", "imagenette-cnn-plain", "imagenette-resnet18", "cifar10-resnet50-224",
        "cifar10-resnet50-64px", "cifar10-resnet101-224", "cifar10-resnet101-64px",
        "cifar10-resnet101-64px-one-cycle", *he,
    )  # fmt: skip


def _question(*recipes: str) -> str:
    """The runs of some recipes."""
    ours = _whole_runs()
    header = ["recipe", "method", "seed numbers", "epochs", "training", "test", "gap", "loss"]
    return table(header, [_reached(ours[name]) for name in recipes if name in ours], numbers=4)


def _whole_rows() -> list[dict]:
    """The rows of recipes that ran on a whole data set."""
    return [row for row in results.read("recipes")["rows"] if not row["subset"]]


def _whole_runs() -> dict[str, dict]:
    """{recipe: its row on the whole data set; that in JAX, if it ran in both frameworks}"""
    rows = sorted(_whole_rows(), key=lambda row: row["framework"], reverse=True)
    return {row["recipe"]: row for row in rows}


def _reached(row: dict) -> list[str]:
    figures = row["figures"]
    train, test, loss = (figures[f] for f in ("train_accuracy", "test_accuracy", "test_loss"))
    return [
        reproduction_page.marked(row),
        RECIPES[row["recipe"]].method,
        ", ".join(map(str, row["seeds"])),
        reproduction_page.epochs(row),
        *(reproduction_page.reached(each) for each in (train, test)),
        f"{100 * (train['mean'] - test['mean']):.1f}",
        f"{loss['mean']:.2f}",
    ]


def recipe_pairs() -> str:
    """Recipes that ran in both frameworks."""
    return reproduction_page.pairs_markdown(results.read("recipes")["rows"])
