"""The table of all recipes that have run, from the files of their runs alone.

A run lies in FOLDER/RECIPE/seedN, with "-torch" for the PyTorch twin and "-subsetM" where only M
images of each split were used. R is the number of seeds of a row.
"""

import base64
import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from flax_resnet import plots
from flax_resnet.config import InputError, TrainConfig, to_dict
from flax_resnet.recipes import COMPARISONS, RECIPES
from flax_resnet.run_directory import read_rows

KEPT = ("config.json", "report.json", "metrics.csv", "timings.csv", "per_class.csv",
        "curves.png", "confusion_matrix.png")  # fmt: skip
"""What of a run directory goes into the results."""


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


JAX_ONLY = {
    "seed", "dataset", "init_from", "new_head", "freeze_backbone", "log_steps",
    "checkpoint_epochs", "skip_nonfinite", "compilation_cache", "num_classes", "on_bad_image",
    "cache", "cache_gib",
}  # fmt: skip
"""Fields of a config that `torch_ref.train` has no flag for, and those that its caller gives."""


def twin_flags(config: TrainConfig) -> list[str]:
    """The settings of a config as flags of `python -m torch_ref.train`."""
    values = to_dict(config)
    del values["parallel"]
    for name in [name for name, value in values.items() if isinstance(value, dict)]:
        values |= values.pop(name)
    given = {k: v for k, v in values.items() if k not in JAX_ONLY and v is not None}
    return [word for name, value in given.items() for word in _flag(name, value)]


def _flag(name: str, value) -> list[str]:
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def folder_name(seed: int, framework: str, subset: int | None) -> str:
    """`seedN[-torch][-subsetM]`."""
    words = [f"seed{seed}", "torch" if framework == "torch" else "", f"subset{subset}"]
    return "-".join(word for word in words[: 3 if subset else 2] if word)


def finished(folder: Path) -> list[Run]:
    """All runs with a report, sorted by recipe (in its order) and name.

    Raises:
      InputError: a run of a recipe that is not known.
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
        seed, torch, subset = re.fullmatch(r"seed(\d+)(-torch)?(?:-subset(\d+))?", name).groups()
        framework = "torch" if torch else "jax"
        report = json.loads(path.read_text())
        subset = int(subset) if subset else None
        yield Run(recipe, framework, subset, int(seed), path.parent, report)


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
            name: _spread([_figure(r, name) for r in reports])
            for name in _names(first)
            if name.split("_")[0] in first.report["splits"]
        },
        "published": RECIPES[first.recipe].published,
        "epochs": [report["epochs"] for report in reports],
        "minutes": float(np.median([report["seconds"] for report in reports])) / 60,
        "hardware": reports[0]["environment"]["device"],
        "data": _copy(reports[0]["command"]),
        "command": reports[0]["command"],
    }


def _names(run: Run) -> list[str]:
    always = ("train_accuracy", "validation_accuracy", "test_accuracy", "test_loss")
    return list(dict.fromkeys([*always, *RECIPES[run.recipe].published]))


def _figure(report: dict, name: str) -> float:
    split, metric = name.split("_", 1)
    return report["splits"][split][metric]


def _spread(values: list[float]) -> dict:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "values": values}


def _copy(command: str) -> str:
    """Which copy of the data: as published, or a folder of image files."""
    return "image folder" if "folder:" in command else "original"


def markdown(rows: list[dict]) -> str:
    """The table; recipes that have not run say so."""
    lines = [
        "| recipe | figure | published | reached | seeds | epochs | minutes | hardware | data |",
        "|---" * 9 + "|",
    ]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row["recipe"] == name]
        figures = list(recipe.published) or ["test_accuracy"]
        lines += [_line(row, figure) for row in own for figure in figures]
        if not own:
            published = ", ".join(f"{v:.4f}" for v in recipe.published.values())
            published, figures = published or "-", ", ".join(map(_words, figures))
            lines.append(f"| `{name}` | {figures} | {published} | not run |" + " |" * 5)
    return "\n".join(lines) + "\n"


def _line(row: dict, figure: str) -> str:
    published = row["published"].get(figure)
    marks = [row["framework"]] if row["framework"] == "torch" else []
    marks += [f"{row['subset']:,} images"] if row["subset"] else []
    cells = [
        f"`{row['recipe']}`" + (f" ({', '.join(marks)})" if marks else ""),
        _words(figure),
        f"{published:.4f}" if published else "-",
        reached(row["figures"][figure]),
        str(len(row["seeds"])),
        "-".join(map(str, sorted({min(row["epochs"]), max(row["epochs"])}))),
        f"{row['minutes']:.0f}",
        row["hardware"],
        row["data"],
    ]
    return "| " + " | ".join(cells) + " |"


def _words(figure: str) -> str:
    return figure.replace("_", " ")


def reached(spread: dict) -> str:
    """`0.8766` or `0.8766 ± 0.0012`."""
    deviation = spread["deviation"]
    return f"{spread['mean']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def comparisons(runs: list[Run]) -> dict[str, list[Run]]:
    """title -> its recipes' first runs, where at least two of them have run alike."""
    found = {}
    for title, names in COMPARISONS.items():
        first = {}
        for run in runs:
            if run.recipe in names and run.framework == "jax" and not run.subset:
                first.setdefault(run.recipe, run)
        if len(first) > 1:
            found[title] = [first[name] for name in names if name in first]
    return found


def discussion(runs: list[Run]) -> str:
    """What changed from the plainest recipe to the others, in a sentence each."""
    plain, sentences = runs[0], []
    for run in runs:
        gap = _figure(run.report, "train_accuracy") - _figure(run.report, "test_accuracy")
        change = _figure(run.report, "test_accuracy") - _figure(plain.report, "test_accuracy")
        words = "" if run is plain else f", {100 * change:+.1f} points against {plain.recipe}"
        sentences.append(
            f"{run.recipe} ({RECIPES[run.recipe].method}) tests at"
            f" {_figure(run.report, 'test_accuracy'):.4f}{words}; training accuracy is"
            f" {100 * gap:+.1f} points above that, best epoch {run.report['best_epoch']}."
        )
    return " ".join(sentences)


def differences(names: Sequence[str]) -> str:
    """Every setting in which recipes differ, with its values in their order."""
    settings = [_settings(name) for name in names]
    parts = []
    for field in settings[0]:
        values = [each[field] for each in settings]
        if any(value != values[0] for value in values):
            parts.append(f"{field.replace('_', ' ')} {', '.join(map(_value, values))}")
    return "; ".join(parts)


def _settings(name: str) -> dict:
    values = {"starts_from": RECIPES[name].starts_from} | to_dict(RECIPES[name].config)
    for group in [key for key, value in values.items() if isinstance(value, dict)]:
        values |= values.pop(group)
    return values


def _value(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def rebuild(folder: Path) -> list[dict]:
    """FOLDER/recipes.{json,md,html} and a picture for each comparison, from FOLDER/recipes/."""
    runs = finished(folder / "recipes")
    rows = table_rows(runs)
    (folder / "recipes.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (folder / "recipes.md").write_text(f"# Published figures, and ours\n\n{markdown(rows)}")
    for title, group in comparisons(runs).items():
        courses = {run.recipe: read_rows(run.folder / "metrics.csv") for run in group}
        plots.comparison(folder / picture_name(title), courses, title)
    (folder / "recipes.html").write_text(page(folder, runs, rows))
    return rows


def picture_name(title: str) -> str:
    """`recipes-....png`."""
    return "recipes-" + re.sub(r"\W+", "-", title.lower()).strip("-") + ".png"


_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Published figures, and ours</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: .85rem }
th { text-align: left; border-bottom: 2px solid #999 }
td { border-bottom: 1px solid #ddd; padding: .2rem .7rem .2rem 0; vertical-align: top }
code, pre { background: #f6f6f6; font-size: .85rem } pre { padding: .6rem; overflow-x: auto }
</style>
<h1>Published figures, and ours</h1>
<p>Every figure is read from the report of a run; models are selected on validation images, the
test split is read once, at the end.</p>
$table
$comparisons
<h2>Every run</h2>
$runs
</html>
""")


def page(folder: Path, runs: list[Run], rows: list[dict]) -> str:
    """One HTML file that needs nothing else."""
    compared = [
        f"<h2>{html.escape(title)}</h2><p>{html.escape(discussion(group))}</p>"
        + f"<p>They differ in: {html.escape(differences([run.recipe for run in group]))}.</p>"
        + _image(folder / picture_name(title), title)
        for title, group in comparisons(runs).items()
    ]
    return _PAGE.substitute(
        table=_html_table(markdown(rows)),
        comparisons="".join(compared),
        runs="".join(map(_section, runs)),
    )


def _html_table(text: str) -> str:
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[html.escape(cell.strip().replace("`", "")) for cell in line] for line in lines]
    head, *body = cells
    rows = "".join("<tr><td>" + "<td>".join(line) + "</tr>" for line in body)
    return f"<table><tr><th>{'<th>'.join(head)}</tr>{rows}</table>"


def _section(run: Run) -> str:
    recipe = RECIPES[run.recipe]
    pictures = [run.folder / name for name in ("curves.png", "confusion_matrix.png")]
    return (
        f"<details><summary>{html.escape(run.recipe)}, {run.folder.name}: test accuracy"
        f" {_figure(run.report, 'test_accuracy'):.4f}</summary><p>{html.escape(recipe.method)}</p>"
        f"<pre>{html.escape(run.report['command'])}</pre>"
        + "".join(_image(path, path.stem) for path in pictures if path.exists())
        + "</details>"
    )


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
