"""Tables read from programs that were compiled and not run."""

from equivalence_tests import results
from equivalence_tests.studies.markdown import table


def scaling() -> str:
    """Memory and exchange of compiled steps on many devices."""
    whose = {"batch": "the whole batch", "device": "each device"}
    lines = []
    for row in results.read("scaling")["rows"]:
        reduced = row["collectives"]
        lines.append([
            row["target"],
            f"{row['devices']:,}",
            "-" if row["devices"] == 1 else whose[row["statistics"]],
            f"{(row['argument_bytes'] + row['temporary_bytes']) / 1e9:.1f}",
            sum(each["count"] for each in reduced),
            sum(each["in_forward"] for each in reduced),
            f"{sum(each['bytes'] for each in reduced) / 1e6:.1f}",
            f"{1e3 * row['bound_seconds_without_exchange']:.1f}",
            f"{1e3 * row['exchange_seconds']:.1f}",
        ])  # fmt: skip
    header = ["target", "devices", "statistics of", "GB", "all-reduces", "forward", "MB",
              "bound, ms", "exchange, ms"]  # fmt: skip
    return table(header, lines, numbers=6)


def plan() -> str:
    """One command of `flax-resnet plan`, its targets side by side."""
    rows = results.read("plan-resnet50")["targets"]
    lines = {
        "devices": [f"{row['devices']:,}" for row in rows],
        "peak of memory, GB": [
            f"{row['peak_bytes'] / 1e9:.1f} of {row['device_memory_bytes'] / 1e9:.1f}"
            for row in rows
        ],
        "largest batch that fits": [f"{row['largest_batch']:,}" for row in rows],
        "TFLOPs of products": [f"{row['flops_per_step'] / 1e12:.2f}" for row in rows],
        "bytes, GB": [f"{row['bytes_per_step'] / 1e9:.1f}" for row in rows],
        "bound, images/s": [f"{row['bound_images_per_second']:,.0f}" for row in rows],
        "all-reduces": [
            f"{sum(each['count'] for each in row['collectives']):,}" for row in rows
        ],
    }  # fmt: skip
    header = ["", *(f"`{row['target']}`" for row in rows)]
    return table(header, [[name, *cells] for name, cells in lines.items()], numbers=len(rows))


def step_bytes() -> str:
    """Bytes of compiled training steps on one H100, and the floor that their shapes allow."""
    rows = results.read("step-bytes")["rows"]
    cells = [
        [network, variant, f"{row['bytes'] / 1e9:.2f}", f"{row['floor'] / 1e9:.2f}",
         f"{row['bytes'] / row['floor']:.3f}"]
        for network, variants in rows.items()
        for variant, row in variants.items()
    ]  # fmt: skip
    return table(["network", "variant", "GB a step", "floor", "of the floor"], cells, numbers=3)


def step_tries() -> str:
    """Other ways to compute a training step on one H100."""
    cells = [
        [network, way, f"{row['bytes'] / 1e9:.2f}", f"{row['temporary_bytes'] / 1e9:.2f}",
         f"{row['flops'] / 1e12:.2f}"]
        for network, ways in results.read("step-tries")["rows"].items()
        for way, row in ways.items()
    ]  # fmt: skip
    header = ["network", "way", "GB a step", "GB of memory", "TFLOPs of products"]
    return table(header, cells, numbers=3)


def compiled() -> str:
    """Bytes and memory of the compiled steps of all networks."""
    rows = {(r["arch"], r["target"], r["dtype"]): r for r in results.read("compiled")["rows"]}
    columns = list(dict.fromkeys((target, dtype) for _, target, dtype in rows))
    header = ["network", *(f"{target}, {dtype}" for target, dtype in columns)]
    archs = dict.fromkeys(arch for arch, *_ in rows)
    lines = [[arch, *(_compiled(rows.get((arch, *c))) for c in columns)] for arch in archs]
    return table(header, lines, numbers=len(columns))


def _compiled(row: dict | None) -> str:
    if row is None:
        return "not compiled"
    figures = f"{row['bytes_per_step'] / 1e9:.2f}; {row['peak_bytes'] / 1e9:.2f}"
    return f"{figures} ({'; '.join(row['wrong'])})" if row["wrong"] else figures


def gradient_sums() -> str:
    """Errors of gradients that devices have summed."""
    rows = results.read("gradient-sums")["rows"]
    lines = {}
    for row in rows:
        line = lines.setdefault(row["devices"], {"devices": f"{row['devices']:,}"})
        line[f"{row['dtype']}, {row['way']}"] = f"{row['median_error']:.1e}"
    header, *_ = map(list, lines.values())
    return table(header, [list(line.values()) for line in lines.values()], numbers=len(header))
