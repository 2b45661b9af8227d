"""Faults of BatchNorm's running statistics."""

from equivalence_tests.parity.causes.evidence import Evidence, constant


def moved_by(evidence: Evidence) -> list[str]:
    """Another momentum of the running statistics, a biased variance, or both.

    The running mean shows the momentum. With that known, the running variance shows the factor of
    the batch variance, so two faults at once are distinguished.
    """
    if not evidence.row.name.endswith(("running_mean", "running_var")):
        return []
    share = _share_of_the_way(evidence)
    found = [] if share is None else [*_other_share(evidence, share), *_biased(evidence, share)]
    return [" and ".join(found)] if found else []


def _share_of_the_way(evidence: Evidence) -> float | None:
    """Change of the module's running mean relative to PyTorch's change; None if not constant."""
    old, got, expected = evidence.statistic("running_mean")
    return constant((got - old) / (expected - old))


def _other_share(evidence: Evidence, share: float) -> list[str]:
    if abs(share - 1) < 1e-6:
        return []
    if abs(share) < 1e-9:
        return ["momentum is 0: running statistics never move"]
    batches = evidence.case.arrays[f"{evidence.module}.num_batches_tracked"] + 1
    if abs(share - 10 / batches) < 1e-9:
        return ["running statistics are means over all batches (momentum=None)"]
    known = " (Flax's default, 0.99)" if abs(share - 0.1) < 1e-6 else ""
    return [f"momentum is {0.1 * share:.4g} instead of 0.1{known}"]


def _biased(evidence: Evidence, share: float) -> list[str]:
    n = biased_count(*evidence.statistic("running_var"), 0.1, share)
    return [f"running_var ratio is (n - 1) / n with n = {n}: biased variance"] if n else []


def biased_count(old, got, expected, momentum: float, share: float) -> int | None:
    """The n of a biased variance: batch variances that differ by (n - 1) / n, n a whole number.

    Args:
      old, got, expected: the running variance before the step, and after it on both sides.
      momentum: PyTorch's.
      share: how far the statistics moved, relative to PyTorch's.

    Returns:
      n; None if the variances differ in another way, or not at all.
    """
    if not share:
        return None
    of_jax, of_torch = old + (got - old) / (momentum * share), old + (expected - old) / momentum
    ratio = constant(of_jax / of_torch)
    if ratio is None or not 0.4 < ratio < 1 - 1e-9:
        return None
    n = 1 / (1 - ratio)
    return round(n) if abs(n - round(n)) <= 1e-3 * n else None


def not_counted(evidence: Evidence) -> list[str]:
    old = evidence.case.arrays[evidence.row.name]
    counts = evidence.row.name.endswith("num_batches_tracked")
    return ["batches are not counted"] if counts and (evidence.got == old).all() else []
