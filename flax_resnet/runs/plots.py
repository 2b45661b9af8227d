"""Plots of runs, made from plain arrays."""

import contextlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flax_resnet import metrics
from flax_resnet.libraries import quiet
from flax_resnet.text import printable

with quiet("matplotlib"):  # it warns if there is no home to keep its list of fonts in
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

_TRAIN, _VALIDATION = "#4c72b0", "#dd8452"
_STEEP = 20  # a loss of more than this many medians would flatten the others
_LARGEST_LABELLED = 30  # most classes of a confusion matrix with names and numbers


def curves(path: Path | BinaryIO, rows: list[dict], best_epoch: int | None = None):
    """Plot training and validation loss and accuracy over the epochs.

    Args:
      rows: a row for each epoch: epoch, train_loss, train_accuracy and, if there is a validation
        split, validation_loss, validation_accuracy.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, colour in (("train", _TRAIN), ("validation", _VALIDATION)):
            if rows and f"{split}_{name}" in rows[0]:
                values = [row[f"{split}_{name}"] for row in rows]
                axis.plot(epochs, values, _line_format(len(rows)), color=colour, label=split)
        if best_epoch:
            axis.axvline(best_epoch, color="0.6", ls=":", label=f"best epoch {best_epoch}")
        axis.set(xlabel="epoch", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _fit_losses(axes[0], [value for row in rows for key, value in row.items() if "loss" in key])
    axes[1].legend(loc="lower right", frameon=False)
    save(figure, path)


def _fit_losses(axis, losses: list[float]):
    """Let the axis begin at 0, or make it logarithmic if a few losses would flatten the others."""
    finite = [value for value in losses if np.isfinite(value) and value > 0]
    if finite and max(finite) > _STEEP * np.median(finite):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def _line_format(num_points: int) -> str:
    """The format of a line: with dots if there are few points."""
    return "o-" if num_points <= 20 else "-"


def confusion_matrix(path: Path | BinaryIO, confusion: np.ndarray, class_names):
    """Plot a confusion matrix; the colour of a cell is its share of the row.

    Args:
      confusion: `[K, K]` counts, row = true class, column = predicted class.
      class_names: K names.
    """
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    num_classes = len(class_names)
    small = num_classes <= _LARGEST_LABELLED
    side = min(12, max(4.5, 0.45 * num_classes + 2)) if small else 8
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axis.set(xlabel="predicted", ylabel="true")
    if small:
        names, families = _writable(class_names)
        names = [name if len(name) <= 16 else name[:15] + "…" for name in names]
        style = {"parse_math": False, "fontfamily": families}  # $ in a name is no mathematics
        axis.set_xticks(range(num_classes), names, rotation=45, ha="right", **style)
        axis.set_yticks(range(num_classes), names, **style)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    save(figure, path)


def reliability(path: Path | BinaryIO, bins: np.ndarray):
    """Plot the accuracy of predictions over their probability, and how many have it.

    Args:
      bins: `[3, metrics.BINS]`: images, hits and sum of the probabilities of each bin.
    """
    images, hits, probabilities = bins
    some, edges = images > 0, np.linspace(0, 1, len(images) + 1)
    figure, (top, low) = plt.subplots(
        2, 1, figsize=(5, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    top.plot([0, 1], [0, 1], ":", color="0.5", label="calibrated")
    shown = probabilities[some] / images[some], hits[some] / images[some]
    top.plot(*shown, _line_format(len(images)), color=_TRAIN, label="this network")
    error = metrics.calibration_error(bins)
    top.set(ylabel="accuracy", ylim=(0, 1.02), title=f"expected calibration error {error:.4f}")
    top.legend(loc="upper left", frameon=False)
    low.bar(edges[:-1], images / images.sum(), np.diff(edges), align="edge", color=_TRAIN)
    low.set(xlabel="probability of the prediction", ylabel="share of images", xlim=(0, 1))
    for axis in (top, low):
        axis.grid(alpha=0.3)
    save(figure, path)


def _writable(names) -> tuple[list[str], list[str]]:
    """The names as a figure can show them, and the installed fonts that have their characters. The
    name of a class without a font becomes its number, from 0."""
    names = [printable(name) for name in names]
    families = list(plt.rcParams["font.sans-serif"][:1])
    missing = set("".join(names)) - _characters(font_manager.findfont(families[0]))
    for font in font_manager.fontManager.ttflist if missing else ():
        if "Last Resort" in font.name or "Emoji" in font.name:  # these have boxes or bitmaps
            continue
        if found := missing & _characters(font.fname):
            families.append(font.name)
            missing -= found
    shown = enumerate(names)
    return [str(i) if missing & set(name) else name for i, name in shown], families


def _characters(font_file: str) -> set[str]:
    """The characters of a font; none if the file is no font."""
    with contextlib.suppress(Exception):
        return set(map(chr, font_manager.get_font(font_file).get_charmap()))
    return set()


def comparison(path: Path, courses: dict[str, list[dict]], title: str):
    """Plot loss and accuracy over the epochs of several runs: validation solid, training dashed.

    Args:
      courses: {label: rows, as in `curves`}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names, families = _writable(printable(label, 60) for label in courses)
    # Matplotlib leaves a label that begins with an underscore out of the legend.
    labels = [name if not name.startswith("_") else f" {name}" for name in names]
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for number, (label, rows) in enumerate(zip(labels, courses.values(), strict=True)):
            epochs = [row["epoch"] for row in rows]
            splits = {"train": "--", "validation": "-"}
            known = [split for split in splits if rows and f"{split}_{name}" in rows[0]]
            for split in known:
                values = [row[f"{split}_{name}"] for row in rows]
                label_once = label if split == known[-1] else None
                axis.plot(epochs, values, splits[split], color=f"C{number}", label=label_once)
        axis.set(xlabel="epoch", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    losses = [v for rows in courses.values() for row in rows for k, v in row.items() if "loss" in k]
    _fit_losses(axes[0], losses)
    for text in axes[1].legend(loc="best", frameon=False, prop={"family": families}).get_texts():
        text.set_parse_math(False)
    figure.suptitle(f"{title} (training dashed)", fontsize=11)
    save(figure, path)


def layer_bytes(path: Path, programs: dict[str, dict[tuple[str, str], int]]):
    """Plot the bytes of each layer of compiled programs, a panel for each program.

    Args:
      programs: {title: {(layer, "forward", "backward" or ""): bytes}}, in the order to show.
    """
    layers = list(dict.fromkeys(layer for sums in programs.values() for layer, _ in sums))
    size = (2 + 4 * len(programs), 1.5 + 0.18 * len(layers))
    figure, axes = plt.subplots(
        1, len(programs), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for axis, (title, sums) in zip(axes[0], programs.items(), strict=True):
        left = np.zeros(len(layers))
        for phase, colour in (("forward", _TRAIN), ("backward", _VALIDATION), ("", "0.6")):
            values = np.array([sums.get((layer, phase), 0) / 1e9 for layer in layers])
            axis.barh(layers, values, left=left, color=colour, label=phase or "neither")
            left += values
        axis.set(title=title, xlabel="GB read and written in a step")
        axis.tick_params(axis="x", top=True, labeltop=True)  # a picture of 100 layers is long
        axis.tick_params(axis="y", labelsize=7)
        axis.use_sticky_edges = False  # else the longest bar ends at the frame
        axis.margins(x=0.02, y=0.01)
        axis.set_xlim(left=0)
    axes[0][0].invert_yaxis()
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def save(figure, path: Path | BinaryIO):
    """Write a figure, without metadata that would change its bytes, and close it."""
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
