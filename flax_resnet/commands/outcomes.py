"""The predictions of a network for each image of a split: a table, and a page of the worst."""

import base64
import contextlib
import html
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flax_resnet import metrics
from flax_resnet.commands import output_files
from flax_resnet.files import CsvRows
from flax_resnet.text import printable

COLUMNS = ("path", "label", "prediction", "probability", "loss")
_SHOWN = 60  # images on the page

Write = Callable[[list[dict]], object]
"""Function that takes the rows of a batch."""

_STYLE = (
    "body{font:14px sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1em}"
    "figure{margin:0;width:160px}img{width:160px;image-rendering:pixelated}"
    "figcaption{overflow-wrap:anywhere}.path{color:#777;font-size:11px}"
)


def rows(batch: dict, outcome: dict, names, class_names: Sequence[str]) -> list[dict]:
    """A row of `COLUMNS` for each image of a batch that could be read.

    Args:
      batch: index, label and mask, `[B]` each.
      outcome: what `evaluation.make_outcomes` gives for the batch.
      names: name of an image by its index.
    """
    return [
        {
            "path": names(batch["index"][row]),
            "label": class_names[batch["label"][row]],
            "prediction": class_names[outcome["prediction"][row]],
            "probability": float(outcome["probability"][row]),
            "loss": float(outcome["loss"][row]),
        }
        for row in np.flatnonzero(batch["mask"])
    ]


def naming(source, split: str) -> Callable[[int], str]:
    """A function from an index to the name of an image: its file, or SPLIT/NUMBER."""
    if source.names is None:
        return lambda index: f"{split}/{index}"
    names = source.names  # a subset makes them anew at every access
    return lambda index: os.fspath(names[int(index)])


@contextlib.contextmanager
def csv_rows(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[Write]:
    """Yields a function that writes rows; "-" is standard output."""
    with output_files.output(path) as file:
        table = CsvRows(file)
        table.write(columns)

        def write(rows: list[dict]):
            for row in rows:
                table.write(row[name] for name in columns)

        yield write


class Pool:
    """The counts `[K, K]` of true classes (rows) and predicted ones, and the loss, of all rows."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.counts = np.zeros((len(names), len(names)), np.int64)
        self._number = {name: index for index, name in enumerate(names)}
        self._loss = 0.0

    def add(self, rows: list[dict]):
        """Take the rows of a batch."""
        for row in rows:
            self.counts[self._number[row["label"]], self._number[row["prediction"]]] += 1
            self._loss += row["loss"]

    def figures(self) -> dict[str, float]:
        """The figures of all predictions together."""
        return {"loss": float(self._loss / self.counts.sum())} | metrics.summarize(self.counts)


class Worst:
    """The rows of the largest losses so far, with their images uint8 `[H, W, C]`."""

    def __init__(self):
        self.rows = []

    def add(self, table: list[dict], images: Sequence[np.ndarray]):
        """Take rows and their images; those of smaller losses are dropped."""
        self.rows += zip(table, images, strict=True)
        self.rows.sort(key=lambda row: -row[0]["loss"])
        del self.rows[_SHOWN:]


def write_page(path: Path, worst: Worst, title: str):
    """Write an HTML page that needs no other file."""
    figures = "\n".join(_figure(row, image) for row, image in worst.rows)
    heading = html.escape(printable(title))
    with output_files.output(path) as file:
        file.write(
            f"<!DOCTYPE html>\n<meta charset=utf-8>\n<title>{heading}</title>\n"
            f"<style>{_STYLE}</style>\n<h1>{heading}</h1>\n<main>\n{figures}\n</main>\n"
        )


def _figure(row: dict, image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    label, prediction, path = (
        html.escape(printable(row[name])) for name in ("label", "prediction", "path")
    )
    return (
        f'<figure><img alt="" src="data:image/png;base64,{picture}"><figcaption><b>{label}</b>,'
        f" taken for <b>{prediction}</b> with {row['probability']:.1%}, loss {row['loss']:.2f}"
        f'<div class="path">{path}</div></figcaption></figure>'
    )
