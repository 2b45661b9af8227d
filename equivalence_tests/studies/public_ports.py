"""Collects comparisons of public networks into results/ports.json.

P=equivalence_tests.studies.public_networks
flax-resnet parity --jax-model $P:haiku --torch-model $P:resnet18 --report out/haiku
...
python -m equivalence_tests.studies.public_ports out/*/parity.json
"""

import argparse
import inspect
import json
from pathlib import Path

from equivalence_tests import results
from equivalence_tests.studies import public_networks

KEPT = ("command", "environment", "verdict", "explained", "causes", "unplaced", "extra",
        "ambiguous", "image_size", "tensors_placed", "largest")  # fmt: skip


def row(document: dict) -> dict:
    """The part of a report that is kept."""
    name = document["subject"].rpartition(":")[2]
    what = inspect.getdoc(getattr(public_networks, name)).splitlines()[0].removesuffix(".")
    return {"name": name, "network": what} | {key: document[key] for key in KEPT}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("reports", nargs="+", type=Path, help="parity.json of the comparisons")
    rows = [row(json.loads(path.read_text())) for path in parser.parse_args().reports]
    results.write("ports", {"rows": rows})
