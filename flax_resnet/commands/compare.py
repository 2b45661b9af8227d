"""Compare runs: print figures with the best marked, and settings that differ; plot the curves.

python scripts/compare.py runs/birds runs/birds-2 runs/birds-3
python scripts/compare.py runs/* --plot curves.png --json runs.json
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table

from flax_resnet.commands import cli, output_files
from flax_resnet.config import TrainConfig, flat
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.runs import views
from flax_resnet.runs.display import Display
from flax_resnet.text import printable

FIGURES = {
    "validation_accuracy": max,
    "validation_loss": min,
    "test_accuracy": max,
    "test_loss": min,
    "test_expected_calibration_error": min,
    "images_per_second": max,
}
"""{figure: the function that gives the best}"""

_BY_DEFINITION = ("compilation_cache", "log_steps")  # they change no result


class Course(NamedTuple):
    """A run, finished or not."""

    config: TrainConfig
    report: dict
    """The content of report.json; {} for an unfinished run and for a damaged report."""

    rows: list[dict]
    """The rows of metrics.csv, as the checkpoint knows them."""

    state: str = ""
    """A word on a missing report: " unfinished" or " report damaged"; else empty."""

    def figures(self) -> dict[str, float]:
        """The run's values of `FIGURES`; those of the reported weights if it is finished."""
        found = {
            f"{split}_{name}": value
            for split, values in self.report.get("splits", {}).items()
            for name, value in values.items()
        }
        found |= {"images_per_second": self.report.get("images_per_second")}
        found = (self.rows[-1] if self.rows and not self.report else {}) | found
        return {name: found[name] for name in FIGURES if _is_number(found.get(name))}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # false for NaN


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument(
        "run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="two or more runs"
    )
    about = "write the curves of loss and accuracy into one picture"
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=about)
    about = "also write figures and differing settings to FILE; - is stdout"
    parser.add_argument("--json", type=Path, metavar="FILE", help=about)
    args = parser.parse_args()
    args.run_dirs = cli.distinct(args.run_dirs)
    if len(args.run_dirs) < 2:
        raise InputError(f"two or more runs are compared, got {args.run_dirs[0]} alone")
    output_files.check_picture("--plot", args.plot)
    output_files.check_outputs(_outputs(args), args.run_dirs)
    return args


def _outputs(args) -> dict[str, Path | None]:
    return {"--plot": args.plot, "--json": args.json}


def read(run_dir: Path) -> Course:
    """The course of a run, as its checkpoint knows it; damaged files beside it are named.

    Raises:
      InputError: there is no run, or it is finished and has no sound checkpoint.
    """
    faults = views.faults(run_dir)
    config = views.read_config(run_dir)
    for fault in faults:
        views.warn(fault)
    report = views.report(run_dir)
    missing = " report damaged" if (run_dir / "report.json").exists() else " unfinished"
    return Course(config, report, views.rows(run_dir), "" if report else missing)


def differing(configs: dict[str, TrainConfig]) -> dict[str, dict]:
    """{setting: {run: value}} of the settings that are not the same in all runs."""
    values = {name: flat(config) for name, config in configs.items()}
    settings = [name for name in flat(TrainConfig()) if name not in _BY_DEFINITION]
    found = {name: {run: values[run][name] for run in values} for name in settings}
    return {n: of for n, of in found.items() if any(v != [*of.values()][0] for v in of.values())}


def best(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """{figure: its best value over the runs}"""
    of = {name: [f[name] for f in figures.values() if name in f] for name in FIGURES}
    return {name: FIGURES[name](values) for name, values in of.items() if values}


def table_of_figures(courses: dict[str, Course]) -> Table:
    """A row for each run; the best of a column has a star."""
    figures = {name: course.figures() for name, course in courses.items()}
    tops = best(figures)
    about = dict(caption="*: best of its column", caption_justify="left")
    table = Table(box=box.SIMPLE, padding=0, **about)  # within 80 columns
    table.add_column("run", overflow="fold")
    rows = {
        name: [
            f"{len(course.rows)}/{course.config.epochs}{course.state}",
            *(_cell(figures[name].get(figure), tops[figure]) for figure in tops),
        ]
        for name, course in courses.items()
    }
    for header, cells in zip(("epochs", *tops), zip(*rows.values(), strict=True), strict=True):
        words = header.split("_")  # no word of a header is divided
        width = max(map(len, (*words, *cells)))
        table.add_column(" ".join(words), justify="right", width=width)
    for name, cells in rows.items():
        table.add_row(printable(name), *cells)
    return table


def _cell(value: float | None, top: float) -> str:
    if value is None:
        return "-"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.4f}") + ("*" if value == top else " ")


def table_of_settings(settings: dict[str, dict]) -> Table:
    """A row for each setting that differs, a column for each run."""
    table = Table(title="settings that differ", title_justify="left")
    table.add_column("setting", overflow="fold")
    for run in next(iter(settings.values())):
        table.add_column(printable(run), overflow="fold")
    for name, values in settings.items():
        table.add_row(name, *(printable(str(value), 40) for value in values.values()))
    return table


def _check_apart(args, courses: Iterable[Course]):
    """Raises InputError for an output among the images of a run."""
    from flax_resnet.data.sources import places  # here, because importing JAX takes a second

    data = {place for course in courses for place in places(course.config.data.dataset)}
    output_files.check_outputs(_outputs(args), data=data)


def main():
    args = parse()
    courses = {str(path): read(path) for path in args.run_dirs}
    if args.plot or args.json:
        _check_apart(args, courses.values())
    settings = differing({name: course.config for name, course in courses.items()})
    display = Display(stderr=str(args.json) == "-")
    display.show(table_of_figures(courses))
    if settings:
        display.show(table_of_settings(settings))
    else:
        display.say("all settings are the same")
    if args.plot:
        from flax_resnet.runs import plots  # here, because importing Matplotlib takes a second

        shared = os.path.dirname(os.path.commonprefix([f"{name}/" for name in courses])) + "/"
        drawn = {n.removeprefix(shared): c.rows for n, c in courses.items() if c.rows}
        with replacing(args.plot) as place:
            plots.comparison(place, drawn, "Runs")
    if args.json:
        figures = {name: course.figures() for name, course in courses.items()}
        values = {"figures": figures, "best": best(figures), "settings": settings}
        output_files.write_json(args.json, values)
