"""Cross-validates the default recipe on the digits, and averages five runs of different seeds, with
the default number of epochs and with twice as many.

python -m equivalence_tests.studies.digits  # 20 minutes; writes results/digits.json and pictures
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from equivalence_tests import results
from flax_resnet.commands import cross_validate

RUNS = 5
EPOCHS = (16, 32)
SHOWN = ("accuracy", "loss")


def main():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = {str(epochs): measured(root / str(epochs), epochs) for epochs in EPOCHS}
        drawn = root / str(EPOCHS[0]) / "folds"
        for picture in cross_validate.PICTURES:
            shutil.copy(drawn / picture, results.FOLDER / f"digits-folds-{picture}")
    results.write("digits", {"epochs": rows})
    print(rows)


def measured(root: Path, epochs: int) -> dict:
    """Figures of folds and of an ensemble, whose runs go into a folder."""
    flags = "--epochs", epochs
    return {"folds": folds(root / "folds", *flags), "ensemble": ensemble(root, *flags)}


def folds(root: Path, *flags) -> dict:
    """Figures of each fold, their mean and deviation, and figures of all predictions together."""
    command("cross_validate", "--folds", RUNS, "--run-dir", root, *flags)
    found = json.loads((root / "cross_validation.json").read_text())
    alone = [figures_of(fold) for fold in found["folds"]]
    whole = {name: figures_of(found[name]) for name in ("mean", "deviation", "pooled")}
    return {"images": found["images"], "alone": alone} | whole


def ensemble(root: Path, *flags) -> dict:
    """Figures on the test split of each run alone, and of the mean of their probabilities."""
    runs = [root / f"seed-{seed}" for seed in range(RUNS)]
    for seed, run in enumerate(runs):
        command("train", "--seed", seed, "--run-dir", run, *flags)
    command("evaluate", *runs, "--json", root / "ensemble.json")
    found = json.loads((root / "ensemble.json").read_text())
    return {
        "alone": [figures_of(run) for run in found["members"].values()],
        "mean": figures_of(found),
    }


def command(name: str, *words):
    """Runs scripts/NAME.py in a process of its own."""
    script = results.FOLDER.parent / "scripts" / f"{name}.py"
    subprocess.run([sys.executable, script, *map(str, words)], check=True)


def figures_of(found: dict) -> dict[str, float]:
    """The figures that are kept."""
    return {name: found[name] for name in SHOWN}


if __name__ == "__main__":
    main()
