"""Weight files that tests write, and comparison of their arrays."""

from pathlib import Path

import numpy as np
import torch


def saved(folder: Path, content, name="weights.pth", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def same(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(
        np.array_equal(got[name], np.asarray(expected[name])) for name in expected
    )
