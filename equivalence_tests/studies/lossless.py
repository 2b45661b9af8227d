"""Asks what networks that were trained on JPEG files make of the lossless images.

python -m equivalence_tests.studies.lossless LOSSLESS JPEG RUN  # adds it to results/lossless.json

LOSSLESS and JPEG hold a folder of images per class; the run was trained on the JPEG files. Those of
its validation images that LOSSLESS has too are predicted twice, from the JPEG file and from the
lossless one, and McNemar's test asks whether one kind has more correct predictions than chance
explains.
"""

import argparse
import tempfile
from pathlib import Path

from scipy.stats import sem

from equivalence_tests import results
from equivalence_tests.studies import copy_cost, temperature
from flax_resnet import machine
from flax_resnet.commands.evaluate import open_data
from flax_resnet.data.sources import Source
from flax_resnet.interop.loaded_run import LoadedRun, load_run

NAME = "lossless"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lossless", type=Path, help="folder of class folders of lossless images")
    parser.add_argument("jpeg", type=Path, help="folder of class folders of the JPEG files")
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = measure(load_run(args.run_dir), args.lossless, args.jpeg, Path(root))
    row = {"revision": machine.revision()} | found
    rows = results.known(NAME)
    command = "python -m equivalence_tests.studies.lossless LOSSLESS JPEG RUN"
    results.write(NAME, {"command": command, "rows": rows | {args.run_dir.name: row}})
    print(row)


def measure(run: LoadedRun, lossless: Path, jpeg: Path, root: Path) -> dict:
    """Accuracy and loss of the run on the validation images of which both files exist, from each
    kind of file; by how much the JPEG files raise the loss, with the standard error over the
    images; and how many images are predicted correctly from one kind alone.

    Args:
      root: an empty folder, which takes copies of the images.
    """
    copy_cost.copy_pairs(lossless, jpeg, root)
    keep_unseen(root, open_data(run, None, "validation").validation)
    row, right, losses = {}, [], []
    for kind in ("lossless", "jpeg"):
        images = open_data(run, f"folder:{root / kind}", "all").train
        logits, labels = temperature.outputs(run, images)
        right.append(logits.argmax(1) == labels)
        losses.append(temperature.losses(logits, labels))
        row |= {
            f"{kind}_accuracy": float(right[-1].mean()),
            f"{kind}_loss": float(losses[-1].mean()),
        }
    added = losses[1] - losses[0]
    row |= {"added_loss": float(added.mean()), "added_loss_error": float(sem(added))}
    return {"images": len(added)} | row | copy_cost.mcnemar(*right)


def keep_unseen(root: Path, unseen: Source):
    """Deletes the pairs of root/lossless and root/jpeg whose JPEG file is not an image of the
    source `unseen`."""
    kept = {unseen.content(index) for index in range(len(unseen))}
    for jpeg in sorted((root / "jpeg").glob("*/*")):
        if jpeg.read_bytes() not in kept:
            jpeg.unlink()
            for path in (root / "lossless" / jpeg.parent.name).glob(f"{jpeg.stem}.*"):
                path.unlink()


if __name__ == "__main__":
    main()
