"""Charts of measured speeds and of predicted scaling."""

from pathlib import Path

from flax_resnet.runs.plots import plt, save

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


def scaling(path: Path, rows: list[dict], statistics: dict[str, str]):
    """Write the share of computation over the number of devices, a line per card and statistics.

    Args:
      rows: target, devices, statistics, share_of_computation; the devices in ascending order.
      statistics: {name: whose images they are, in words}.
    """
    figure, axis = plt.subplots(figsize=(8, 4.8))
    for card, marker in zip(dict.fromkeys(_card(row) for row in rows), "os^", strict=False):
        for name, words in statistics.items():
            own = [r for r in rows if _card(r) == card and (r["statistics"] == name or
                                                            r["devices"] == 1)]  # fmt: skip
            axis.plot(
                [row["devices"] for row in own],
                [row["share_of_computation"] for row in own],
                label=f"{card}, statistics of {words}",
                marker=marker,
                linestyle="-" if name == "device" else "--",
            )
    counts = sorted({row["devices"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{count:,}" for count in counts])
    axis.set(xlabel="devices", ylabel="share of computation in a step", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title("Compiled programs and assumed links, nothing run and nothing overlapped")
    figure.tight_layout()
    save(figure, path)


def _card(row: dict) -> str:
    return row["target"].partition(":")[0]


def serving(path: Path, programs: dict[str, dict], title: str):
    """Write the latency of one image and the speed of batches, a bar for each number of cores.

    Args:
      programs: {name: {"cores": {"1" or "2": {"milliseconds", "images_per_second"}}}}.
    """
    panels = {
        "milliseconds": ("ms for one image", "{:.1f}"),
        "images_per_second": ("images/s in batches", "{:,.0f}"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained", sharey=True)
    for axis, (figure_name, (words, digits)) in zip(axes, panels.items(), strict=True):
        for number, cores in enumerate((1, 2)):
            values = [found["cores"][str(cores)][figure_name] for found in programs.values()]
            places = [place + 0.4 * number for place in range(len(values))]
            axis.barh(places, values, 0.38, label=f"{cores} core{'s' * number}")
            axis.bar_label(axis.containers[-1], fmt=digits, padding=3, fontsize=8)
        axis.set_yticks([place + 0.2 for place in range(len(programs))], list(programs))
        axis.set(xlabel=words)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    save(figure, path)
