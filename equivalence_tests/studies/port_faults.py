"""Puts each fault into each layer of a small network of another framework and judges it.

    python -m equivalence_tests.studies.port_faults nnx linen haiku equinox
    python -m equivalence_tests.studies.port_faults nnx --seeds 20     # false alarms instead

Writes results/port-faults.json after every network, and goes on where it was interrupted.
"""

import argparse
import importlib
import time

from equivalence_tests import results
from equivalence_tests.mutants import foreign_networks
from equivalence_tests.mutants.foreign_networks import in_torch
from equivalence_tests.parity import compare_models
from flax_resnet.text import listed

NAME = "port-faults"
CAUSES = {
    "SAME padding": '"SAME"',
    "stride in the next": "the stride is",
    "rotated kernel": "rotated by 180 degrees",
    "transposed kernel": "height and width swapped",
    "eps 1e-3": "eps is 0.001",
    "decay 0.99": "a decay of 0.99",
    "biased variance": "biased variance",
    "running statistics in training": "normalises by the running statistics",
    "batch statistics in evaluation": "normalises by the batch's statistics",
    "missing": "there is no",
    "leaky": "leaky",
    "tanh": "tanh approximation",
    "no padding": "has no padding",
    "ReLU before": "before the addition",
    "stopped gradient": "no gradient passes",
    "padding counted": "counts a padding",
    "maximum": "global max-pool",
    "no bias": "there is no bias",
}
"""{fault: words of its cause}."""


def module(layer: str) -> str:
    """PyTorch's name of a layer."""
    prefix, _, name = layer.rpartition(".")
    if name.startswith("act"):
        return f"{prefix}.relu" if prefix else layer
    return prefix if name == "add" else layer


def judged(framework: str, faults: dict[str, str], seed: int = 0, **settings) -> dict:
    """The outcome of one comparison."""
    started = time.monotonic()
    theirs = importlib.import_module(f"{foreign_networks.__name__}.in_{framework}")
    make = getattr(theirs, "net", getattr(theirs, "Net", None))
    report = compare_models(make(faults, **settings), in_torch.Net(**settings), seed=seed)
    return {
        "verdict": report.verdict,
        "explained": report.explained,
        "causes": report.groups(),
        "notes": report.notes,
        "seconds": round(time.monotonic() - started, 1),
    }


def right(row: dict, layer: str, fault: str) -> bool:
    """True if a row names the layer and its cause, and no other layer for another cause."""
    words, names = CAUSES[fault], [module(layer)]
    if not row["causes"]:
        return any(words in note and layer in note for note in row["notes"])
    named = any(words in cause and names[0] in layers for cause, layers in row["causes"].items())
    return named and all(words in c or layers == names for c, layers in row["causes"].items())


def run(frameworks: list[str], rows: dict, write) -> None:
    for activation, stem in (("relu", 3), ("gelu", 7)):
        for framework in frameworks:
            for layer, fault in foreign_networks.eligible(activation, stem):
                key = f"{framework} {activation} {layer} {fault}"
                if key not in rows:
                    row = judged(framework, {layer: fault}, activation=activation, stem=stem)
                    rows[key] = row | {"right": right(row, layer, fault)}
                    write()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="+", choices=("nnx", "linen", "haiku", "equinox"))
    parser.add_argument("--seeds", type=int, default=0, metavar="N")
    args = parser.parse_args()
    try:
        document = results.read(NAME)
    except FileNotFoundError:
        document = {}
    document = {"rows": {}, "alarms": {}} | document

    def write():
        right_rows = sum(row["right"] for row in document["rows"].values())
        results.write(NAME, {"rows": document["rows"], "alarms": document["alarms"],
                             "right": right_rows})  # fmt: skip

    for framework in args.frameworks if args.seeds else ():
        for seed in range(args.seeds):
            document["alarms"][f"{framework} {seed}"] = judged(framework, {}, seed)["verdict"]
            write()
    if not args.seeds:
        run(args.frameworks, document["rows"], write)
    wrong = [key for key, row in document["rows"].items() if not row["right"]]
    print(f"{len(document['rows']) - len(wrong)} of {len(document['rows'])} right; {listed(wrong)}")


if __name__ == "__main__":
    main()
