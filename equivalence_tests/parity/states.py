"""Conversion of JAX's trees to arrays with torch's names and layouts, and back."""

from flax_resnet.config import OptimizerConfig
from flax_resnet.interop import training_state
from flax_resnet.training.steps import TrainState

named = training_state.named_arrays
optimizer_state = training_state.optimizer_arrays


def resumed(state: TrainState, trace: dict, optimizer: str) -> TrainState:
    """A state that continues from the end of a trace, of either framework.

    Args:
      trace: has the phases parameters, batch_norm and optimizer.
    """
    arrays = {
        "model": trace["parameters"] | trace["batch_norm"],
        "optimizer": trace["optimizer"],
        "ema": {},
        "step": int(state.step),
    }
    return training_state.load_training_arrays(state, arrays, OptimizerConfig(optimizer=optimizer))
