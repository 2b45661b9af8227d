"""Files of measured results: results/NAME.json, with the command and the machine."""

import json
from pathlib import Path

from flax_resnet import machine
from flax_resnet.commands import exits
from flax_resnet.config import finite
from flax_resnet.runs import environment

FOLDER = Path(__file__).parents[1] / "results"


def write(name: str, document: dict):
    """Writes results/NAME.json; adds "command" and "environment" unless the document has them."""
    measured = {"command": exits.command_line(), "environment": environment.describe(1)}
    text = json.dumps(finite(measured | document), indent=1, allow_nan=False)
    (FOLDER / f"{name}.json").write_text(text + "\n")


def read(name: str) -> dict:
    """Reads results/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def known(name: str, key: str = "rows") -> dict:
    """Reads what results/NAME.json holds under the key; empty if there is no such file."""
    return read(name)[key] if (FOLDER / f"{name}.json").exists() else {}


class Recorder:
    """A pytest plugin: outcome, seconds and revision of every test, added to results/NAME.json."""

    def __init__(self, name: str):
        self.name = name
        self.tests = known(name, "tests")
        self.revision = machine.revision()

    def pytest_runtest_logreport(self, report):
        """Records the call of every test, and each set-up that failed or was skipped."""
        if report.when == "call" or not report.passed:
            row = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
            self.tests[report.nodeid] = row | {"revision": self.revision}
            self.write()

    def write(self):
        """Writes the file, after every test because a run of hours may be cut off."""
        outcomes = [row["outcome"] for row in self.tests.values()]
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        write(self.name, {**counts, "tests": self.tests})
