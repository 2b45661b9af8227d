"""Tables, plots and the HTML page of the figures that all recipes reached."""

import base64
import html
import json
import re
from pathlib import Path
from string import Template

from equivalence_tests.studies.reproduction import (
    LEVEL,
    MARGIN,
    Run,
    comparisons,
    course,
    differences,
    discussion,
    finished,
    score,
    side_by_side,
    table_rows,
)
from flax_resnet.config import finite
from flax_resnet.files import replacing
from flax_resnet.recipes import RECIPES, Recipe
from flax_resnet.runs import plots
from flax_resnet.text import printable


def rebuild(folder: Path) -> list[dict]:
    """Write FOLDER/recipes.{json,md,html} and a plot per comparison, from FOLDER/recipes/."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = finished(folder / "recipes")
    rows = table_rows(runs)
    figures = {"rows": rows, "side_by_side": side_by_side(rows)}
    content = json.dumps(finite(figures), indent=1, allow_nan=False)
    _write(folder / "recipes.json", content + "\n")
    text = f"# Published figures, and ours\n\n{COLUMNS}\n\n{markdown(rows)}\n{not_run(rows)}"
    if pairs := pairs_markdown(rows):
        text += f"\n## The same recipe in JAX and in PyTorch\n\n{PAIRS_METHOD}\n\n{pairs}"
    _write(folder / "recipes.md", text)
    for title, group in comparisons(runs).items():
        courses = {label(run): course(run) for run in group}
        with replacing(folder / picture_name(title)) as place:
            plots.comparison(place, courses, title)
    _write(folder / "recipes.html", page(folder, runs, rows))
    return rows


def _write(path: Path, text: str):
    with replacing(path) as place:
        place.write_text(text)


COLUMNS = """\
A recipe is a named config of a training. Each row has one figure of one recipe. "Published" is the
figure of the recipe's source, and "reached" is the figure here: the mean over the seeds, with the
standard deviation if there are several. A dash means that the source has no such figure. Pixels are
the width and height of the images. Minutes are the median of a run. The runs read a copy of the
data set as JPEG files, which for CIFAR-10 are of quality 75, unless the row says "original". Every
figure is read from the report of a run. Validation images choose the epoch whose weights are
evaluated, where a recipe chooses one. Test images are read once, at the end."""


def markdown(rows: list[dict]) -> str:
    """The Markdown table of all recipes that have run."""
    lines = [
        "| recipe | figure | published | reached | seeds | epochs | pixels | minutes | hardware |",
        "|---" * 9 + "|",
    ]
    for name, recipe in RECIPES.items():
        own = [row for row in rows if row["recipe"] == name]
        figures = list(recipe.published) or ["test_accuracy"]
        lines += [_line(row, figure) for row in own for figure in figures]
    return "\n".join(lines) + "\n"


def not_run(rows: list[dict]) -> str:
    """A sentence that names the recipes without a row, with their published figures; "" if there
    are none."""
    known = {row["recipe"] for row in rows}
    missing = [_with_figures(*item) for item in RECIPES.items() if item[0] not in known]
    return f"Not run: {', '.join(missing)}.\n" if missing else ""


def _with_figures(name: str, recipe: Recipe) -> str:
    figures = [f"{_words(name)} {value:.4f}" for name, value in recipe.published.items()]
    return f"`{name}`" + (f" (published {figures[0]})" if figures else "")


def _line(row: dict, figure: str) -> str:
    published = row["published"].get(figure)
    cells = [
        marked(row),
        _words(figure),
        f"{published:.4f}" if published else "-",
        reached(row["figures"][figure]),
        str(len(row["seeds"])),
        epochs(row),
        str(row["pixels"]),
        f"{row['minutes']:.0f}",
        printable(row["hardware"]).replace("|", "/"),
    ]
    return "| " + " | ".join(cells) + " |"


def marked(row: dict) -> str:
    """The recipe of a row, marked if PyTorch ran it or if its images are not the usual ones."""
    marks = ["torch"] if row["framework"] == "torch" else []
    marks += ["original"] if row["data"] == "original" else []
    return _marked(row["recipe"], marks, row["subset"])


def label(run: Run) -> str:
    """The recipe of a run, marked if PyTorch ran it."""
    return run.recipe + (" (torch)" if run.framework == "torch" else "")


def _marked(recipe: str, marks: list[str], subset: int | None) -> str:
    marks = marks + ([f"{subset:,} images"] if subset else [])
    return f"`{recipe}`" + (f" ({', '.join(marks)})" if marks else "")


def epochs(row: dict) -> str:
    """Fewest and most epochs of the seeds: `15` or `7-10`."""
    return "-".join(map(str, sorted({min(row["epochs"]), max(row["epochs"])})))


def _words(figure: str) -> str:
    return figure.replace("_", " ")


def reached(spread: dict) -> str:
    """Mean and deviation as text: `0.8766` or `0.8766 ± 0.0012`."""
    deviation = spread["deviation"]
    return f"{spread['mean']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


PAIRS_METHOD = f"""\
Both frameworks ran the same seeds, but each draws its own weights, batches and augmentation, so the
runs are two independent samples. The accuracies are means, with the standard deviation. The two are
called equivalent if two one-sided Welch tests at {100 * LEVEL:.0f}% show that their means differ by
less than {100 * MARGIN:.1f} percentage points. Minutes are the median of a run."""


def pairs_markdown(rows: list[dict]) -> str:
    """One line per recipe that ran in both frameworks; "" if none did."""
    lines = [
        "| recipe | seeds | test accuracy, JAX | PyTorch | minutes, JAX | PyTorch"
        " | difference, points (90% interval) | equivalent |",
        "|---" * 8 + "|",
    ]
    lines += map(_pair_line, side_by_side(rows))
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _pair_line(pair: dict) -> str:
    outcome = ["-", "not tested"]
    if "p_value" in pair:
        low, high = (f"{100 * bound:+.1f}" for bound in pair["interval_90"])
        word = "yes" if pair["equivalent"] else "not shown"
        outcome = [
            f"{100 * pair['difference']:+.1f} ({low} to {high})",
            f"{word}, p = {pair['p_value']:.2g}",
        ]
    cells = [
        _marked(pair["recipe"], [], pair["subset"]),
        str(len(pair["seeds"])),
        *(reached(pair[framework]) for framework in ("jax", "torch")),
        *(f"{pair[framework]['minutes']:.0f}" for framework in ("jax", "torch")),
        *outcome,
    ]
    return f"| {' | '.join(cells)} |"


def picture_name(title: str) -> str:
    """File name of a comparison's plot: `recipes-....png`."""
    return "recipes-" + re.sub(r"\W+", "-", title.lower()).strip("-") + ".png"


_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Published figures, and ours</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem } img { max-width: 100%; margin-top: 1rem }
table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top }
summary { padding: .15rem 0; cursor: pointer }
th { border-bottom: 2px solid #999 } td { border-bottom: 1px solid #ddd }
code, pre { background: #f6f6f6; font-size: .85rem } pre { padding: .6rem; overflow-x: auto }
</style>
<h1>Published figures, and ours</h1>
<p>$columns</p>
$table
<p>$not_run</p>
$pairs
<h2>Comparisons</h2>
<p>Each comparison takes the first seed of its recipes, the plainest recipe first. Points are
percentage points. In the plots, solid lines are validation images and dashed lines are training
images, which are augmented.</p>
$comparisons
<h2>Every run</h2>
<p>Each entry opens to the command, the curves and the confusion matrix of the run.</p>
$runs
</html>
""")


def page(folder: Path, runs: list[Run], rows: list[dict]) -> str:
    """The page as one self-contained HTML file."""
    compared = [
        f"<h3>{html.escape(title)}</h3>"
        + _discussion(group)
        + _image(folder / picture_name(title), title)
        for title, group in comparisons(runs).items()
    ]
    return _PAGE.substitute(
        columns=html.escape(COLUMNS),
        table=_html_table(markdown(rows)),
        not_run=html.escape(not_run(rows).replace("`", "")),
        pairs=_pairs_section(rows),
        comparisons="".join(compared),
        runs="".join(map(_section, runs)),
    )


def _discussion(runs: list[Run]) -> str:
    items = "".join(
        f"<li><code>{html.escape(label(run))}</code>: {html.escape(RECIPES[run.recipe].method)}."
        f" {html.escape(discussion(run, runs[0]))}"
        for run in runs
    )
    names = [run.recipe for run in runs]
    if len(set(names)) == 1:  # one recipe in two frameworks
        return f"<ul>{items}</ul>"
    rows = [["setting", *names], *([name, *cells] for name, cells in differences(names).items())]
    return f"<ul>{items}</ul><p>The recipes differ in these settings:</p>{_html_rows(rows)}"


def _pairs_section(rows: list[dict]) -> str:
    pairs = pairs_markdown(rows)
    title = "<h2>The same recipe in JAX and in PyTorch</h2>"
    return f"{title}<p>{PAIRS_METHOD}</p>{_html_table(pairs)}" if pairs else ""


def _html_table(text: str) -> str:
    lines = [line.strip()[1:-1].split("|") for line in text.splitlines() if line.startswith("| ")]
    return _html_rows([[cell.strip().replace("`", "") for cell in line] for line in lines])


def _html_rows(cells: list[list[str]]) -> str:
    """A table, whose first row is the header."""
    head, *body = [[html.escape(cell) for cell in line] for line in cells]
    rows = "".join("<tr><td>" + "<td>".join(line) + "</tr>" for line in body)
    return f"<table><tr><th>{'<th>'.join(head)}</tr>{rows}</table>"


def _section(run: Run) -> str:
    recipe = RECIPES[run.recipe]
    pictures = [run.folder / name for name in ("curves.png", "confusion_matrix.png")]
    words = [{"jax": "JAX", "torch": "PyTorch"}[run.framework], f"seed {run.seed}"]
    words += [f"{run.subset:,} images"] if run.subset else []
    return (
        f"<details><summary>{html.escape(run.recipe)}, {', '.join(words)}: test accuracy"
        f" {score(run.report, 'test_accuracy'):.4f}</summary><p>{html.escape(recipe.method)}</p>"
        f"<pre>{html.escape(run.report['command'])}</pre>"
        + "".join(_image(path, path.stem) for path in pictures if path.is_file())
        + "</details>"
    )


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
