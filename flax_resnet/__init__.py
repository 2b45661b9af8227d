"""ResNets in Flax NNX and Optax, equal to PyTorch's."""

from flax_resnet.interop.convert import load_state_dict, state_dict
from flax_resnet.models import create_model, list_models

__all__ = ["create_model", "list_models", "load_state_dict", "state_dict"]
