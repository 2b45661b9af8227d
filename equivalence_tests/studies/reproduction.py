"""The results of all recipes, from the files of their runs alone.

A run lies in FOLDER/RECIPE/seedN, with "-torch" for the PyTorch twin and "-subsetM" where only M
images of each split were used. R is the number of seeds of a row.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from flax_resnet.config import to_dict
from flax_resnet.errors import InputError
from flax_resnet.recipes import COMPARISONS, RECIPES
from flax_resnet.runs.tables import read_rows
from flax_resnet.runs.views import read_report
from flax_resnet.text import listed

KEPT = ("config.json", "report.json", "metrics.csv", "timings.csv", "per_class.csv",
        "curves.png", "confusion_matrix.png")  # fmt: skip
"""The files of a run directory that go into the results."""

MARGIN = 0.005
"""The largest difference of two mean accuracies that counts as none."""

LEVEL = 0.05
"""The level of the tests whether the difference is smaller."""

CIFAR10_PIXELS = 32
"""Width and height of an image of CIFAR-10, which its recipes take where they give no size."""


class Run(NamedTuple):
    """A finished run."""

    recipe: str

    framework: str
    """"jax" or "torch"."""

    subset: int | None
    """Images of each split, where not all of them were used."""

    seed: int

    folder: Path

    report: dict


def _flat(values: dict) -> dict:
    """The fields of a config and of its groups, side by side."""
    groups = [name for name, value in values.items() if isinstance(value, dict)]
    for group in groups:
        values |= values.pop(group)
    return values


def folder_name(seed: int, framework: str, subset: int | None) -> str:
    """`seedN[-torch][-subsetM]`."""
    words = [f"seed{seed}", "torch" if framework == "torch" else "", f"subset{subset}"]
    return "-".join(word for word in words[: 3 if subset else 2] if word)


def finished(folder: Path) -> list[Run]:
    """All runs with a report, sorted by recipe (in its order) and name.

    Raises:
      InputError: a run of a recipe that is not known, or a folder that is named as no run.
    """
    names = list(RECIPES)
    return sorted(
        _finished(folder),
        key=lambda run: (names.index(run.recipe), run.framework, run.subset or 0, run.seed),
    )


def _finished(folder: Path) -> Iterator[Run]:
    for path in folder.glob("*/seed*/report.json"):
        recipe, name = path.parts[-3:-1]
        if recipe not in RECIPES:
            raise InputError(f"{path.parent}: no recipe has the name {recipe!r}")
        found = re.fullmatch(r"seed(\d+)(-torch)?(?:-subset(\d+))?", name)
        if not found:
            raise InputError(f"{path.parent}: not the name of a run, seedN[-torch][-subsetM]")
        seed, torch, subset = found.groups()
        framework = "torch" if torch else "jax"
        report = _read(path, recipe)
        subset = int(subset) if subset else None
        yield Run(recipe, framework, subset, int(seed), path.parent, report)


_ELSEWHERE = {"epochs": int, "environment": dict, "command": str, "best_epoch": int}
"""{fact of a report beside its figures: its type}"""


def _read(path: Path, recipe: str) -> dict:
    """A report; InputError unless it has all that the table and the page need."""
    report = read_report(path)
    wrong = [name for name, kind in _ELSEWHERE.items() if not isinstance(report.get(name), kind)]
    wrong += [] if _is_number(report.get("seconds")) else ["seconds"]
    if not wrong and not isinstance(report["environment"].get("device"), str):
        wrong.append("environment.device")
    scores = {f"{s}_{n}": v for s, of in report["splits"].items() for n, v in of.items()}
    needed = [*_ALWAYS, *RECIPES[recipe].published]
    needed += [f"{split}_{name}" for split in report["splits"] for name in ("loss", "accuracy")]
    wrong += [name for name in dict.fromkeys(needed) if not _is_number(scores.get(name))]
    if wrong:
        raise InputError(f"{path}: {listed(wrong)} is missing or wrong")
    return report


_ALWAYS = ("train_accuracy", "test_accuracy", "test_loss")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # false for NaN


def course(run: Run) -> list[dict]:
    """The rows of a run's metrics.csv; InputError unless they have all that a plot needs."""
    path, splits = run.folder / "metrics.csv", run.report["splits"].keys() & {"train", "validation"}
    needed = {"epoch", *(f"{split}_{name}" for split in splits for name in ("loss", "accuracy"))}
    needed -= {"train_accuracy"} if run.framework == "torch" else set()  # it measures none
    rows = read_rows(path)
    if not rows or (missing := needed - rows[0].keys()):
        raise InputError(f"{path}: {listed(sorted(missing)) if rows else 'every row'} is missing")
    return rows


def table_rows(runs: list[Run]) -> list[dict]:
    """One row for the seeds of a recipe in one framework: figures with mean and deviation."""
    groups = {}
    for run in runs:
        groups.setdefault(run[:3], []).append(run)
    return [_row(group) for group in groups.values()]


def _row(runs: list[Run]) -> dict:
    first = runs[0]
    reports = [run.report for run in runs]
    return {
        "recipe": first.recipe,
        "framework": first.framework,
        "subset": first.subset,
        "seeds": [run.seed for run in runs],
        "figures": {
            name: _spread([score(r, name) for r in reports])
            for name in _figure_names(first)
            if all(name.split("_")[0] in report["splits"] for report in reports)
        },
        "published": RECIPES[first.recipe].published,
        "epochs": [report["epochs"] for report in reports],
        "pixels": RECIPES[first.recipe].config.data.image_size or CIFAR10_PIXELS,
        "minutes": float(np.median([report["seconds"] for report in reports])) / 60,
        "hardware": ", ".join(dict.fromkeys(each["environment"]["device"] for each in reports)),
        "data": _copy(reports[0]["command"]),
        "command": reports[0]["command"],
    }


def _figure_names(run: Run) -> list[str]:
    always = ("train_accuracy", "validation_accuracy", "test_accuracy", "test_loss")
    return list(dict.fromkeys([*always, *RECIPES[run.recipe].published]))


def score(report: dict, name: str) -> float:
    split, metric = name.split("_", 1)
    return report["splits"][split][metric]


def _spread(values: list[float]) -> dict:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "values": values}


def _copy(command: str) -> str:
    """The copy of the data that a run used: as published, or a folder of image files."""
    return "image folder" if "folder:" in command else "original"


def comparisons(runs: list[Run]) -> dict[str, list[Run]]:
    """title -> its recipes' first runs, where at least two of them have run on the same images: on
    all, or, as the title then says, on a subset. A run in JAX goes before one in PyTorch. One
    recipe is compared in the two frameworks."""
    found = {}
    for title, names in COMPARISONS.items():
        alike = {}
        for run in sorted(runs, key=lambda run: run.framework):
            if run.recipe in names:
                key = run.recipe if len(names) > 1 else run.framework
                alike.setdefault(run.subset, {}).setdefault(key, run)
        for subset, first in alike.items():
            if len(first) > 1:
                marked = f"{title} ({subset:,} images)" if subset else title
                order = names if len(names) > 1 else first
                found[marked] = [first[name] for name in order if name in first]
    return found


def discussion(run: Run, plain: Run) -> str:
    """The accuracies of a run, beside the test accuracy of the plainest run."""
    train, test = (score(run.report, f"{split}_accuracy") for split in ("train", "test"))
    change = test - score(plain.report, "test_accuracy")
    other = plain.recipe if plain.recipe != run.recipe else "the first run"
    words = "" if run is plain else f" ({100 * change:+.1f} points against {other})"
    monitor = RECIPES[run.recipe].config.early_stopping.monitor.replace("_", " ")
    return (
        f"Seed {run.seed} reached a test accuracy of {test:.4f}{words} and a training accuracy of"
        f" {train:.4f}. Epoch {run.report['best_epoch']} had the best {monitor}."
    )


def differences(names: Sequence[str]) -> dict[str, list[str]]:
    """{setting in which recipes differ: its value in each of them}."""
    settings = [_settings(name) for name in names]
    values = {field: [_value(each[field]) for each in settings] for field in settings[0]}
    return {f.replace("_", " "): found for f, found in values.items() if len(set(found)) > 1}


def _settings(name: str) -> dict:
    start = {"starts_from": RECIPES[name].starts_from or "random weights"}
    return start | _flat(to_dict(RECIPES[name].config))


def _value(value) -> str:
    words = value if isinstance(value, list) else ["default" if value is None else value]
    return " ".join(map(str, words))


def side_by_side(rows: list[dict]) -> list[dict]:
    """The recipes that ran in both frameworks, over the seeds that both have.

    The same seed gives other weights, batches and augmentation in each of them, so the runs are two
    independent samples.
    """
    found = {(row["recipe"], row["subset"], row["framework"]): row for row in rows}
    ours = [key for key in found if key[2] == "jax" and (*key[:2], "torch") in found]
    both = [_compared(found[key], found[*key[:2], "torch"]) for key in ours]
    return [pair for pair in both if pair["seeds"]]


def _compared(ours: dict, theirs: dict) -> dict:
    seeds = sorted(set(ours["seeds"]) & set(theirs["seeds"]))
    compared = {"recipe": ours["recipe"], "subset": ours["subset"], "seeds": seeds}
    values = {}
    for row in (ours, theirs):
        accuracies = row["figures"]["test_accuracy"]["values"]
        by_seed = dict(zip(row["seeds"], accuracies, strict=True))
        values[row["framework"]] = [by_seed[seed] for seed in seeds]
        compared[row["framework"]] = _spread(values[row["framework"]]) | {"minutes": row["minutes"]}
    enough = len(seeds) > 1 and any(np.ptp(each) > 0 for each in values.values())
    return compared | (equivalence(values["jax"], values["torch"]) if enough else {})


def equivalence(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Two one-sided tests (Schuirmann 1987) by Welch's t of |difference of means| < `MARGIN`."""
    low = stats.ttest_ind(ours, np.subtract(theirs, MARGIN), equal_var=False, alternative="greater")
    high = stats.ttest_ind(ours, np.add(theirs, MARGIN), equal_var=False, alternative="less")
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(1 - 2 * LEVEL)
    p_value = float(max(low.pvalue, high.pvalue))
    return {
        "difference": float(np.mean(ours) - np.mean(theirs)),
        "interval_90": [float(bound) for bound in interval],
        "p_value": p_value,
        "equivalent": p_value < LEVEL,
    }
