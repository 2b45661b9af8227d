"""Reads weight files with one bit flipped: refused, read as the same weights, or as other weights.

    python -m equivalence_tests.studies.weight_flips --flips 1000      # half a minute

A current `.pth` has checksums of all its data; a flip elsewhere (dates, padding) is harmless. The
format before PyTorch 1.6 and .safetensors have no checksums, so only contradictions are noticed.
Writes results/weight-flips.json; exit status 1 if a current `.pth` was read as other weights.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from equivalence_tests import results
from equivalence_tests.parity import inputs
from flax_resnet.errors import InputError
from flax_resnet.weights import convert, files
from torch_ref import checkpoint

Arrays = dict[str, np.ndarray]
OUTCOMES = REFUSED, SAME, OTHER = "refused", "same weights", "other weights"


def save_legacy(path: Path, arrays: Arrays):
    """Save in the format of PyTorch before 1.6."""
    torch.save(checkpoint.to_tensors(arrays), path, _use_new_zipfile_serialization=False)


KINDS: dict[str, Callable[[Path, Arrays], None]] = {
    ".pth": checkpoint.save,
    ".pth before PyTorch 1.6": save_legacy,
    ".safetensors": lambda path, arrays: save_file(arrays, path),
}


def network() -> Arrays:
    """Weights of a ResNet-20."""
    return inputs.make_case("resnet20").arrays


def read_network(path: Path) -> Arrays:
    """Read weights as scripts/convert.py does."""
    arrays, _ = files.load(path)
    return convert.conform(arrays, convert.nearest_architecture(arrays).shapes())


def count(kind: str, arrays: Arrays, flips: int, read=read_network) -> dict:
    """Counts the outcomes of `flips` files with one random bit flipped.

    Errors other than InputError are raised.
    """
    draw, counts = random.Random(0), Counter(dict.fromkeys(OUTCOMES, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        KINDS[kind](path, arrays)
        sound = path.read_bytes()
        for _ in range(flips):
            flipped, bit = bytearray(sound), draw.randrange(8 * len(sound))
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            counts[_outcome(path, arrays, read)] += 1
    return dict(counts)


def _outcome(path: Path, arrays: Arrays, read) -> str:
    try:
        got = read(path)
    except InputError:
        return REFUSED
    same = got.keys() == arrays.keys() and all(
        got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes()
        for name, array in arrays.items()
    )
    return SAME if same else OTHER


def counts(flips: int) -> dict:
    """`count` of a ResNet-20 in every format."""
    return {kind: count(kind, network(), flips) for kind in KINDS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000, metavar="N", help="files of each kind")
    flips = parser.parse_args().flips
    found = counts(flips)
    print("\n".join(f"{kind}: {numbers}" for kind, numbers in found.items()))
    results.write("weight-flips", {"flips": flips, **found})
    return int(found[".pth"][OTHER] > 0)


if __name__ == "__main__":
    sys.exit(main())
