"""Pictures from plain arrays."""

import contextlib
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager

from flax_resnet.text import printable

_TRAIN, _VALIDATION = "#4c72b0", "#dd8452"
_LARGEST_LABELLED = 30  # classes up to which a confusion matrix has names and numbers


def curves(path: Path, rows: list[dict], best_epoch: int | None = None):
    """Loss and accuracy over epochs, training and validation.

    Args:
      rows: one an epoch: epoch, train_loss, train_accuracy and, where there is a validation
        split, validation_loss, validation_accuracy.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for split, colour in (("train", _TRAIN), ("validation", _VALIDATION)):
            if rows and f"{split}_{name}" in rows[0]:
                values = [row[f"{split}_{name}"] for row in rows]
                axis.plot(epochs, values, colour_marker(len(rows)), color=colour, label=split)
        if best_epoch:
            axis.axvline(best_epoch, color="0.6", ls=":", label=f"best epoch {best_epoch}")
        axis.set(xlabel="epoch", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(bottom=0)
    axes[1].legend(loc="lower right", frameon=False)
    _save(figure, path)


def colour_marker(num_points: int) -> str:
    """Dots where there are few points, a line alone where there are many."""
    return "o-" if num_points <= 20 else "-"


def confusion_matrix(path: Path, confusion: np.ndarray, class_names):
    """Rows are true classes; colour is the share of the row.

    Args:
      confusion: `[K, K]` counts.
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
        as_it_is = {"parse_math": False, "fontfamily": families}  # $ is no mathematics here
        axis.set_xticks(range(num_classes), names, rotation=45, ha="right", **as_it_is)
        axis.set_yticks(range(num_classes), names, **as_it_is)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def _writable(names) -> tuple[list[str], list[str]]:
    """The names as a figure can show them, and the installed fonts that have their characters:
    a name that no font has is its number, from 0."""
    names = [printable(name) for name in names]
    families = list(plt.rcParams["font.sans-serif"][:1])
    missing = set("".join(names)) - _characters(font_manager.findfont(families[0]))
    for font in font_manager.fontManager.ttflist if missing else ():
        if "Last Resort" in font.name or "Emoji" in font.name:  # boxes; pictures of one size
            continue
        if found := missing & _characters(font.fname):
            families.append(font.name)
            missing -= found
    shown = enumerate(names)
    return [str(i) if missing & set(name) else name for i, name in shown], families


def _characters(font_file: str) -> set[str]:
    """Those that a font has; none of a file that is no font."""
    with contextlib.suppress(Exception):
        return set(map(chr, font_manager.get_font(font_file).get_charmap()))
    return set()


def throughput(path: Path, rows: list[dict]):
    """Images a second of every variant, a panel a mode; the line is the interquartile range.

    Args:
      rows: framework, variant, mode, images_per_second, images_per_second_iqr.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    height = 1.2 + 0.35 * max(sum(row["mode"] == mode for row in rows) for mode in modes)
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5.5 * len(modes), height), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        part = [row for row in rows if row["mode"] == mode]
        speeds = [row["images_per_second"] for row in part]
        axis.barh(
            [f"{row['framework']} {row['variant']}" for row in part],
            speeds,
            xerr=[row["images_per_second_iqr"] / 2 for row in part],
            color=[_TRAIN if row["framework"] == "jax" else _VALIDATION for row in part],
        )
        axis.bar_label(axis.containers[-1], [f"{speed:,.1f}" for speed in speeds], padding=6)
        axis.set(xlabel="images/s", title=mode)
        axis.invert_yaxis()
        axis.margins(x=0.25)  # for the labels beside the bars
    _save(figure, path)


def comparison(path: Path, courses: dict[str, list[dict]], title: str):
    """Loss and accuracy over epochs of several runs: validation drawn through, training dashed.

    Args:
      courses: label -> rows as for `curves`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        for number, (label, rows) in enumerate(courses.items()):
            epochs = [row["epoch"] for row in rows]
            for split, line in (("train", "--"), ("validation", "-")):
                values = [row[f"{split}_{name}"] for row in rows]
                label_once = label if split == "validation" else None
                axis.plot(epochs, values, line, color=f"C{number}", label=label_once)
        axis.set(xlabel="epoch", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle(f"{title} (training dashed)", fontsize=11)
    _save(figure, path)


def scaling(path: Path, gpus, rows: list[dict], fabrics: dict[str, str]):
    """Predicted efficiency over the number of GPUs, a panel a fabric, a line a network.

    Args:
      gpus: of each point.
      rows: arch, efficiency: {fabric: a share for each of gpus}.
      fabrics: {fabric: title of its panel}.
    """
    figure, axes = plt.subplots(1, len(fabrics), figsize=(13, 4.8), sharey=True)
    colours = plt.get_cmap("tab20").colors
    for axis, fabric in zip(axes, fabrics, strict=True):
        for number, row in enumerate(rows):
            # Ever thinner, so that lines on one another are all seen.
            style = {"color": colours[number], "linewidth": 4 - 3 * number / len(rows)}
            axis.plot(gpus, row["efficiency"][fabric], label=row["arch"], **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(gpus[::2], [f"{count:,}" for count in gpus[::2]])
        axis.set(xlabel="GPUs", title=fabrics[fabric], ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("predicted efficiency (weak scaling)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
