"""JAX's trees <-> arrays under torch's names, in torch's layouts."""

from flax_resnet.config import OptimizerConfig
from flax_resnet.interop import training_state
from flax_resnet.training.steps import TrainState

named = training_state.named_arrays
optimizer_state = training_state.optimizer_arrays


def resumed(state: TrainState, trace: dict, optimizer: str) -> TrainState:
    """A state that goes on where a trace (torch's or ours) ended.

    Args:
      trace: its phases parameters, batch_norm and optimizer.
    """
    arrays = {
        "model": trace["parameters"] | trace["batch_norm"],
        "optimizer": trace["optimizer"],
        "ema": {},
        "step": int(state.step),
    }
    return training_state.load_training_arrays(state, arrays, OptimizerConfig(optimizer=optimizer))
