"""Causes of a difference in BatchNorm's running statistics, solved from one step."""

import numpy as np

from equivalence_tests.parity.causes.evidence import constant
from equivalence_tests.parity.causes.in_statistics import biased_count


def causes(mean: tuple, variance: tuple, momentum: float) -> tuple[list[str], dict]:
    """Another momentum, a biased variance, or both: one sentence each, and options of `batch_norm`.

    Args:
      mean, variance: (before the step, what JAX has after it, what PyTorch has after it).
      momentum: PyTorch's.
    """
    old, got, expected = (np.asarray(a, np.float64) for a in mean)
    if np.array_equal(old, expected):  # PyTorch's momentum is 0
        return [], {}
    share = constant((got - old) / (expected - old), noise=1e-9)
    if share is None:
        return [], {}
    if abs(share) < 1e-9:
        return ["running statistics do not move"], {"momentum": 0.0}
    found, options = [], {}
    if abs(share - 1) > 1e-6:
        options["momentum"] = momentum * share
        found.append(f"BatchNorm's momentum is {momentum * share:.4g} instead of {momentum:g}"
                     f" (a decay of {1 - momentum * share:.4g})")  # fmt: skip
    if biased_count(*variance, momentum, share):
        options["biased"] = True
        found.append(BIASED)
    return found, options


BIASED = "the running variance takes the biased variance of the batch (n instead of n - 1)"
