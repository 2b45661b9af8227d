"""Pictures from plain arrays."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

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
            if f"{split}_{name}" in rows[0]:
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
        names = [name if len(name) <= 16 else name[:15] + "…" for name in class_names]
        axis.set_xticks(range(num_classes), names, rotation=45, ha="right")
        axis.set_yticks(range(num_classes), names)
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
