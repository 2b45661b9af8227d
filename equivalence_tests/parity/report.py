"""The report of `scripts/parity.py --report`: one self-contained HTML file.

A "semantic" difference is one of definition, larger than rounding.
"""

import html
import io
import json
import math
from pathlib import Path
from string import Template

from equivalence_tests.parity import predictions, tolerances
from flax_resnet.libraries import quiet

with quiet("matplotlib"):  # it warns if there is no home to keep its list of fonts in
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

COLOURS = {"equal": "#2a9d8f", "rounding": "#4c72b0", "semantic": "#d62828"}
PHASES = {
    "forward": "Forward: activations",
    "gradient": "Backward: gradients",
    "batch_norm": "BatchNorm statistics after one step",
    "optimizer": "Optimizer state after one step",
    "parameters": "Parameters after one step",
}
_FLOOR = 1e-17  # position of errors of exactly 0

_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { border-left: .5rem solid $colour; background: #f6f6f6; padding: .8rem 1rem; }
.verdict strong { color: $colour; font-size: 1.25rem }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; padding: .15rem .9rem .15rem 0; font-variant-numeric: tabular-nums }
th { border-bottom: 2px solid #999; position: sticky; top: 0; background: white }
td { border-bottom: 1px solid #ddd } .n { text-align: right }
.equal { color: $equal } .rounding { color: $rounding } .semantic { color: $semantic;
  font-weight: bold }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }
summary { cursor: pointer; margin-top: 1rem }
</style>
<h1>$title</h1>
<p>$subtitle</p>
<div class="verdict"><strong>$verdict</strong><br>$explanation</div>
$charts
<h2>What was compared</h2>
<p>"Relative" is the norm of the difference over the norm of PyTorch's tensor. "Equal" tensors are
the same bit for bit; "rounding" is a difference that rounding explains; "semantic" is a larger one,
a difference of definition. An "ulp" is the distance between neighbouring floating-point numbers at
the largest value of a tensor.</p>
$counts
$agreement
<details><summary>Every tensor ($rows tensors)</summary>$table</details>
$names
<details><summary>How this was made</summary><pre>$environment</pre></details>
</html>
""")


def page(document: dict) -> str:
    """The whole report as HTML; all names are escaped."""
    equal = document["verdict"] == "equal"
    verdict = {"equal": "Equal", "undecided": "Undecided"}.get(document["verdict"], "Divergent")
    return _PAGE.substitute(
        title=html.escape(f"Parity: {document['subject']} and {document['standard']}"),
        subtitle=html.escape(document["what"]),
        colour=COLOURS["equal" if equal else "semantic"],
        verdict=verdict,
        explanation=_explanation(document),
        charts="".join(
            f"<h2>{_title(m)}</h2>{_chart(rows)}" for m, rows in document["rows"].items()
        ),
        counts=_counts(document["rows"]),
        agreement=_agreement(document.get("predictions")),
        names=_names(document),
        rows=sum(map(len, document["rows"].values())),
        table="".join(_table(mode, rows) for mode, rows in document["rows"].items()),
        environment=html.escape(
            json.dumps(
                {k: document[k] for k in ("command", "environment")}, indent=1, allow_nan=False
            )
        ),
        **COLOURS,
    )


def _title(mode: str) -> str:
    return {"evaluation": "Evaluation mode", "training": "Training mode, one step"}[mode]


def _explanation(document) -> str:
    if "sentence" in document:
        return _causes(document)
    finding = document["first_divergence"]
    if finding is None and document["verdict"] == "divergent":
        text = html.escape(predictions.explanation(document["predictions"]))
        return f"{text[0].upper()}{text[1:]}."
    if finding is None:
        return (
            "Every tensor agrees to rounding. The largest relative difference is"
            f" {document['largest']:.1e}."
        )
    causes = " or ".join(finding["causes"]) or "no known cause predicts these numbers"
    where = f"{finding['phase']} of {finding['module'] or 'the whole network'}, {finding['mode']}"
    return (
        f"First divergence: <b>{html.escape(where)}</b> ({html.escape(finding['name'])}, relative"
        f" difference {finding['norm_relative']:.1e}).<br>Likely cause: {html.escape(causes)}."
    )


def _causes(document) -> str:
    """The verdict on two networks of the user's own: every cause with all its layers."""
    in_jax = {layer["torch_name"]: layer["jax_name"] for layer in document["divergent_layers"]}
    items = [
        f"<b>{html.escape(cause)}</b>: "
        + html.escape(", ".join(f"{n} ({in_jax[n]})" if in_jax[n] else n for n in names))
        for cause, names in document["causes"].items()
    ]
    others = [line for line in document["lines"] if line.split(": ")[0] not in document["causes"]]
    items += map(html.escape, others)
    listing = f"<ul><li>{'<li>'.join(items)}</ul>" if items else ""
    return html.escape(document["sentence"]) + listing


def _names(document) -> str:
    """The tensors of two networks of the user's own: PyTorch's name and JAX's path of each."""
    if "mapping" not in document:
        return ""
    pairs = document["mapping"].items()
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(', '.join(leaves))}</tr>"
        for name, leaves in pairs
    )
    head = "<tr><th>PyTorch<th>JAX</tr>"
    summary = f"Which tensor is which ({len(pairs)} tensors of PyTorch)"
    return f"<details><summary>{summary}</summary><table>{head}{rows}</table></details>"


def picture(path: Path, rows: list[dict]):
    """Write the chart of one mode as PNG."""
    figure = _figure(rows)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _chart(rows: list[dict]) -> str:
    return _svg(_figure(rows))


def _figure(rows: list[dict]):
    """Relative difference of every tensor, in the order of computation."""
    shown = [p for p in PHASES if any(r["phase"] == p for r in rows)]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(10, 1.9 * len(shown) + 0.4), sharex=False, layout="constrained"
    )
    for axis, phase in zip([axes] if len(shown) == 1 else axes, shown, strict=True):
        part = [r for r in rows if r["phase"] == phase]
        values = [min(max(r["norm_relative"], _FLOOR), 1e3) for r in part]
        axis.scatter(
            range(len(part)), values, s=10, c=[COLOURS[r["verdict"]] for r in part], zorder=3
        )
        axis.axhline(tolerances.FORWARD, color="0.6", lw=0.8, ls="--")
        top = 10 ** math.ceil(max(0, math.log10(max(values))) + 1)
        axis.set(yscale="log", ylim=(_FLOOR / 3, max(top, 1)), xlim=(-1, len(part)))
        axis.set_title(PHASES[phase], loc="left", fontsize=10)
        axis.set_ylabel("relative\ndifference", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        _stage_ticks(axis, part)
    figure.legend(handles=_legend(), loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def _legend():
    dots = [Line2D([], [], ls="", marker="o", color=c, label=v) for v, c in COLOURS.items()]
    return [*dots, Line2D([], [], color="0.6", lw=0.8, ls="--", label="most that rounding makes")]


MOST_TICKS = 14


def _stage_ticks(axis, rows):
    """Add a tick at the first tensor of each stage, as `layer1` or `features.1`."""
    names = [row["name"].split(" ")[0].split(":")[0].split(".") for row in rows]
    layers = [n[0] for n in names if n[0].startswith("layer")]
    depth = 1 if layers or len({n[0] for n in names}) > 3 else 2
    starts, last = {}, None
    for index, name in enumerate(names):
        stage = ".".join(name[:depth])
        if stage != last and (not layers or stage.startswith("layer")):
            starts.setdefault(index, stage)
        last = stage
    if len(starts) > MOST_TICKS:
        starts = {}
    axis.set_xticks(list(starts), list(starts.values()), fontsize=8)


def _svg(figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()[file.getvalue().index("<svg") :]


def _counts(modes: dict) -> str:
    lines = []
    for mode, rows in modes.items():
        for phase in dict.fromkeys(r["phase"] for r in rows):
            part = [r for r in rows if r["phase"] == phase]
            count = {v: sum(r["verdict"] == v for r in part) for v in COLOURS}
            worst = max(part, key=lambda r: r["norm_relative"])
            cells = "".join(f'<td class="n {v}">{n or ""}</td>' for v, n in count.items())
            lines.append(
                f"<tr><td>{mode}<td>{phase}{cells}<td class=n>{worst['norm_relative']:.1e}"
                f"<td>{html.escape(worst['name'])}</tr>"
            )
    numbers = "".join(f"<th class=n>{name}" for name in (*COLOURS, "largest relative"))
    head = f"<tr><th>mode<th>phase{numbers}<th>where</tr>"
    return f"<table>{head}{''.join(lines)}</table>"


def _agreement(found: dict | None) -> str:
    if not found:
        return ""
    return (
        f"<h2>Predictions</h2><p>{found['agree']:,} of {found['images']:,} images of"
        f" {html.escape(found['dataset'])} get the same class from both;"
        f" {predictions.accuracies(found)}.</p>"
    )


def _table(mode: str, rows: list[dict]) -> str:
    head = (
        "<tr><th>phase<th>tensor<th>shape<th class=n>largest element, relative"
        "<th class=n>relative<th class=n>largest element, ulp<th>verdict</tr>"
    )
    body = "".join(
        f"<tr><td>{r['phase']}<td>{html.escape(r['name'])}<td>{'x'.join(map(str, r['shape']))}"
        f"<td class=n>{r['max_relative']:.1e}<td class=n>{r['norm_relative']:.1e}"
        f"<td class=n>{r['ulp']:.3g}<td class={r['verdict']}>{r['verdict']}</tr>"
        for r in rows
    )
    return f"<h2>{_title(mode)}</h2><table>{head}{body}</table>"
