"""Charts of measured speeds and of predicted scaling."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from flax_resnet.runs.plots import save

COLOURS = {"jax": "#4c72b0", "torch": "#dd8452"}
MODES = {
    "train": "training step",
    "inference": "inference",
    "end_to_end": "training from images",
    "time_to_accuracy": "training to an accuracy",
}


def speeds(path: Path, rows: list[dict]):
    """Write a panel per mode with a bar per variant; error bars show the interquartile range.

    Args:
      rows: framework, variant, mode, arch, image_size, batch_size, dtype, device,
        images_per_second, images_per_second_iqr; seconds_to_accuracy in that mode.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    height = 1.6 + 0.35 * max(sum(row["mode"] == mode for row in rows) for mode in modes)
    figure, axes = plt.subplots(
        1, len(modes), figsize=(6 * len(modes), height), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        _bars(axis, mode, [row for row in rows if row["mode"] == mode])
    first = rows[0]
    figure.suptitle(
        f"{first['arch']}, {first['image_size']} px, batch {first['batch_size']},"
        f" {first['dtype']}, on a {first['device'].upper()}",
        fontsize=11,
    )
    save(figure, path)


def _bars(axis, mode: str, rows: list[dict]):
    names, values, errors, unit = _bars_of(mode, rows)
    colours = [COLOURS[name.partition(" ")[0]] for name in names]
    places = range(len(names))  # two bars may have one name
    axis.barh(places, values, xerr=errors, color=colours)
    axis.bar_label(axis.containers[-1], [f"{value:,.1f}" for value in values], padding=6)
    axis.set_yticks(places, names)
    axis.set(xlabel=unit, title=MODES.get(mode, mode))
    axis.invert_yaxis()
    axis.margins(x=0.25)  # for the labels beside the bars


def _bars_of(mode: str, rows: list[dict]) -> tuple[list[str], list, list | None, str]:
    """Names, values and errors of the bars, and the unit; one bar per row or per training."""
    names = [" ".join(filter(None, (row["framework"], row["variant"]))) for row in rows]
    if mode == "time_to_accuracy":
        times = [
            (f"{name}, training {number}", seconds)
            for name, row in zip(names, rows, strict=True)
            for number, seconds in enumerate(row["seconds_to_accuracy"], 1)
        ]
        return *map(list, zip(*times, strict=True)), None, "seconds to the accuracy"
    errors = [row["images_per_second_iqr"] / 2 for row in rows]
    return names, [row["images_per_second"] for row in rows], errors, "images/s"


def scaling(path: Path, gpus: list[int], rows: list[dict], fabrics: dict[str, str]):
    """Write predicted efficiency over the number of GPUs, a panel per fabric, a line per network.

    Args:
      gpus: numbers of GPUs, in ascending order.
      rows: arch, efficiency: {fabric: a share for each of gpus}.
      fabrics: {fabric: title of its panel}.
    """
    figure, axes = plt.subplots(1, len(fabrics), figsize=(13, 4.8), sharey=True)
    colours = plt.get_cmap("viridis")
    for axis, fabric in zip(axes, fabrics, strict=True):
        ordered = sorted(rows, key=lambda row: -row["efficiency"][fabric][-1])
        for number, row in enumerate(ordered):
            colour = colours(number / len(ordered))
            axis.plot(gpus, row["efficiency"][fabric], color=colour, linewidth=1.5)
        axis.set_xscale("log", base=2)
        axis.set_xlim(1, gpus[-1] * 24)  # for the names beside the ends
        _name_lines(axis, gpus, ordered, fabric)
        axis.set_xticks(gpus[::2], [f"{count:,}" for count in gpus[::2]])
        axis.set(xlabel="GPUs", title=fabrics[fabric], ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency (weak scaling)")
    figure.suptitle("Predicted, not measured: efficiency of a training step on many GPUs")
    figure.tight_layout()
    save(figure, path)


def _name_lines(axis, gpus, rows, fabric):
    """Write names of networks at the ends of their lines; for close lines, one name and a count."""
    groups = []
    for row in rows:
        end = row["efficiency"][fabric][-1]
        if groups and groups[-1][0] - end < 0.035:
            groups[-1][1].append(row["arch"])
        else:
            groups.append((end, [row["arch"]]))
    for end, names in groups:
        more = f" + {len(names) - 1}" if len(names) > 1 else ""
        axis.annotate(names[0] + more, (gpus[-1], end), xytext=(4, 0), fontsize=7,
                      textcoords="offset points", va="center")  # fmt: skip
