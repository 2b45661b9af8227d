"""Collects comparisons of public networks into results/ports.json.

P=equivalence_tests.studies.public_networks
flax-resnet parity --jax-model $P:haiku --torch-model $P:resnet18 --report out/haiku
...
python -m equivalence_tests.studies.public_ports out/*/parity.json
"""

import inspect
import json
import sys
from pathlib import Path

from equivalence_tests import results
from equivalence_tests.studies import public_networks

KEPT = ("command", "environment", "verdict", "explained", "causes", "unplaced", "extra",
        "ambiguous", "image_size", "tensors_placed", "largest")  # fmt: skip


def row(document: dict) -> dict:
    """What is kept of one report."""
    name = document["subject"].rpartition(":")[2]
    what = inspect.getdoc(getattr(public_networks, name)).splitlines()[0].removesuffix(".")
    return {"name": name, "network": what} | {key: document[key] for key in KEPT}


if __name__ == "__main__":
    rows = [row(json.loads(Path(path).read_text())) for path in sys.argv[1:]]
    results.write("ports", {"rows": rows})
