"""Runs the tests, and other projects' criteria for a correct port, on every mutant.

    python -m equivalence_tests.studies.kill_matrix  # all; an hour on two cores
    python -m equivalence_tests.studies.kill_matrix --only "no Nesterov"  # replaces these rows
    python -m equivalence_tests.studies.kill_matrix --seeds 20  # false alarms instead
    python -m equivalence_tests.studies.kill_matrix --seeds 20 --go-on  # after an interruption

A mutant is a known difference between ports and PyTorch, injected as a fault. A test that fails on
it kills it. Writes results/kill-matrix.json and .md. Exit status 1 if a mutant survives or a test
fails on correct code.
"""

import argparse
import concurrent.futures
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from equivalence_tests import mutants, results
from equivalence_tests.studies import criteria
from flax_resnet import machine
from flax_resnet.commands import exits

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "equivalence_tests" / "numerics"


FIRST = {
    "layers": ("layers", "float64", "convert"),
    "optimizers": ("optim", "float64"),
    "schedules": ("schedules",),
    "losses": ("losses_metrics", "layers", "float64"),
    "images": ("images", "augment", "policies", "sampling"),
}
"""{group of mutants: test files that most likely fail, so run first}."""


CRASHES = ("AttributeError", "ImportError", "NameError", "TypeError")
"""Errors of a mutant whose own code no longer fits the code that it changes: no test kills it."""


def run_tests(*flags: str, first=()) -> tuple[int, dict[str, str]]:
    """Runs the tests of equality; returns their number and {failed test: message}."""
    names = sorted(path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py"))
    names.sort(key=lambda name: first.index(name) if name in first else len(first))
    files = [str(TESTS / f"test_{name}.py") for name in names]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *files]
        command += ["-m", "quick and not control and not slow", "-p", "no:cacheprovider", "-n", "0"]
        run = subprocess.run(
            [*command, f"--junit-xml={report}", *flags], cwd=ROOT, capture_output=True, text=True
        )
        if run.returncode not in (0, 1, 2):
            raise RuntimeError(f"pytest {' '.join(flags)}: {run.stdout[-2000:]}{run.stderr[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    return len(cases), {f"{_file(case)}::{case.get('name')}": _message(case) for case in wrong}


def _message(case) -> str:
    fault = case.find("failure") if case.find("failure") is not None else case.find("error")
    return fault.get("message", "").splitlines()[0][:200]


def _file(case) -> str:
    return (case.get("classname") or case.get("name")).rsplit("test_", 1)[-1]


def row(mutant: mutants.Mutant) -> dict:
    """The row of one mutant, with the first test that fails on it."""
    started = time.monotonic()
    group = next(name for name, group in mutants.GROUPS.items() if mutant in group)
    count, failed = run_tests("-x", "--mutant", mutant.name, first=FIRST[group])
    kills = (test for test, message in failed.items() if not message.startswith(CRASHES))
    return {
        "mutant": mutant.name,
        "difference": mutant.difference,
        "what": mutant.what,
        "killed_by": next(kills, None),
        "message": next(iter(failed.values()), None),
        "tests_run": count,
        "seconds": round(time.monotonic() - started, 1),
        "revision": machine.revision(),
    }


def measure(chosen: list[mutants.Mutant], jobs: int) -> list[dict]:
    """One row per mutant, printed as it comes."""
    rows = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(row, chosen):
            rows.append(result)
            print(
                f"{result['difference']:4s}{result['mutant']:36s}{result['killed_by']}", flush=True
            )
    seen_by_others = criteria.verdicts(chosen)
    return [r | {"seen_by": seen_by_others[r["mutant"]]} for r in rows]


def false_alarms(seeds: int, rows: dict[str, dict]) -> dict[str, dict]:
    """Runs the tests on correct code with other inputs.

    Args:
      rows: {seed: row} of seeds that are done; each new row is written as it comes.

    Returns:
      {seed: {"tests": count, "failed": {test: message}, "revision"}}.
    """
    revision = machine.revision()  # before the first row is written
    for seed in map(str, range(1, seeds + 1)):
        if seed not in rows:
            count, failed = run_tests("--inputs-seed", seed)
            rows[seed] = {"tests": count, "failed": failed, "revision": revision}
            results.write("false-alarms", {"seeds": rows})
        print(
            f"inputs {seed}: {rows[seed]['tests']} tests, failed {rows[seed]['failed']}", flush=True
        )
    return rows


def markdown(rows: list[dict]) -> str:
    """The matrix as a Markdown table."""
    others = list(criteria.CRITERIA)
    lines = ["| no. | mutant | what it does | first test to fail | " + " | ".join(others) + " |"]
    lines += ["|---" * (4 + len(others)) + "|"]
    for r in sorted(rows, key=lambda r: _order(r["difference"])):
        killer = f"`{r['killed_by']}`" if r["killed_by"] else "**survives**"
        seen = ["found" if name in r["seen_by"] else "missed" for name in others]
        cells = [r["difference"], r["mutant"], r["what"], killer, *seen]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _order(difference: str) -> tuple[int, str]:
    number, letter = re.fullmatch(r"(\d+)(\w?)", difference).groups()
    return int(number), letter


def summary(rows: list[dict]) -> str:
    """All counts in two sentences."""
    killed = sum(bool(r["killed_by"]) for r in rows)
    others = [f"{sum(name in r['seen_by'] for r in rows)} ({name})" for name in criteria.CRITERIA]
    return (
        f"A test fails on {killed} of {len(rows)} mutants. The criteria of other projects find"
        f" {', '.join(others)}."
    )


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="test runs at a time")
    parser.add_argument("--seeds", type=int, metavar="N", help="look for false alarms instead")
    parser.add_argument("--go-on", action="store_true", help="keep rows of finished seeds")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.seeds:
        done = results.read("false-alarms").get("seeds", {}) if args.go_on else {}
        return int(any(row["failed"] for row in false_alarms(args.seeds, done).values()))
    chosen = [mutants.MUTANTS[name] for name in args.only or mutants.MUTANTS]
    rows = measure(chosen, args.jobs)
    command = exits.command_line()
    if args.only:
        before = results.read("kill-matrix")
        rows, command = _updated(before["rows"], rows), before["command"]
    write({"command": command, "summary": summary(rows), "rows": rows})
    print(summary(rows))
    return int(not all(r["killed_by"] for r in rows))


def _updated(before: list[dict], rows: list[dict]) -> list[dict]:
    known = {r["mutant"]: r for r in before} | {r["mutant"]: r for r in rows}
    return [known[name] for name in mutants.MUTANTS if name in known]


def write(document: dict):
    results.write("kill-matrix", document)
    (results.FOLDER / "kill-matrix.md").write_text(page(document))


def page(document: dict) -> str:
    """The matrix in Markdown, with what its columns mean."""
    projects = [f"- {name}: {_sentence(see)}" for name, see in criteria.CRITERIA.items()]
    without = [f"- {number}: {why}" for number, why in mutants.NOT_APPLICABLE.items()]
    return "\n".join([
        f"# Kill matrix\n\n{INTRODUCTION}\n\n`{document['command']}`\n\n{document['summary']}\n",
        f"{CRITERIA}\n", *projects, "", markdown(document["rows"]),
        "One known difference has a number and no mutant:\n", *without, "",
    ])  # fmt: skip


INTRODUCTION = """\
A mutant is a known difference between JAX ports and PyTorch, injected as a fault. Mutants with the
same number are variants of one difference. The tests that compare JAX with PyTorch run on each
mutant, and the table names the first test that fails: `layers::test_bottleneck` is in
`equivalence_tests/numerics/test_layers.py`. This command made the table:"""

CRITERIA = """\
The last six columns are criteria by which other projects accept a port. They run on resnet18, and
for the mutants 8a and 11b on resnext50_32x4d. They cannot find faults of optimizers, schedules,
images and other networks. "Found" means that the criterion rejects the mutant:"""


def _sentence(see) -> str:
    return " ".join(see.__doc__.split()).rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
