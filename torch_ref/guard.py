"""The guard against numbers that are not finite."""

from torch import Tensor, nn

from flax_resnet.errors import FAILED


class NonFiniteLoss(FloatingPointError):
    """The loss of a step or of a split is NaN or infinite, or the weights after an epoch are."""

    exit_status = FAILED


def check_epoch(model: nn.Module, losses: Tensor, first_step: int) -> None:
    """Raises NonFiniteLoss for the losses [N] of an epoch, or for the weights after it."""
    if not losses.isfinite().all():
        index = losses.isfinite().logical_not().nonzero()[0].item()
        raise NonFiniteLoss(f"the loss of step {first_step + index} is {losses[index]}")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        step = first_step + len(losses) - 1
        raise NonFiniteLoss(f"the weights after step {step} are not finite")
