"""The guard against numbers that are not finite: in a step, in an epoch, in a result."""

from collections.abc import Sequence

from flax_resnet.devices import distributed

_SMALLER_STEPS = "a new `run_dir` with a smaller `lr` or `clip_norm` 1"


class NonFiniteLoss(distributed.CollectiveError):
    """The loss, the gradient or an output of the network is NaN or infinite."""

    exit_status = 1


def first_fault(rows: Sequence[dict], bad_steps: int, allowed: int) -> tuple[int | None, int]:
    """Find the step at which a run has to stop.

    Args:
      rows: metrics of consecutive steps, each with a bool "finite".
      bad_steps: number of steps in a row before them that were not finite.
      allowed: number of such steps in a row that are skipped before the run stops.

    Returns:
      Index of that row, or None; and the number of non-finite steps in a row after the last row.
    """
    for index, row in enumerate(rows):
        bad_steps = 0 if row["finite"] else bad_steps + 1
        if bad_steps > allowed:
            return index, bad_steps
    return None, bad_steps


def fault_of_step(step: int, last_finite: dict | None, saved: int | None, place) -> NonFiniteLoss:
    """The error of a step that is not finite.

    Args:
      last_finite: metrics of the last step that was.
      saved: step of the newest checkpoint.
      place: the run directory.
    """
    seen = "no step before it was finite"
    if last_finite is not None:
        seen = (
            f"last finite loss {last_finite['loss']:.6g},"
            f" gradient norm {last_finite['gradient_norm']:.6g}"
        )
    what_next = f"there is no checkpoint yet; begin again in {_SMALLER_STEPS}"
    if saved is not None:
        what_next = f"checkpoint of step {saved} in {place}; `init_from` it in {_SMALLER_STEPS}"
    return NonFiniteLoss(f"step {step}: the loss or gradient is not finite; {seen}; {what_next}")


def fault_of_epoch(epoch: int) -> NonFiniteLoss:
    """The error of an epoch in which every step was skipped."""
    return NonFiniteLoss(
        f"epoch {epoch}: no step had a finite loss and gradient; begin again in {_SMALLER_STEPS}"
    )


def fault_of_result(what: str, epoch: int, place) -> NonFiniteLoss:
    """The error of weights or losses that cannot be reported."""
    return NonFiniteLoss(
        f"{what} after epoch {epoch} is not finite; {place} has no report; begin again in"
        f" {_SMALLER_STEPS}"
    )
