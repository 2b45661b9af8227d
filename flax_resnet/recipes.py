"""Named configs. Each says how it is run, how long it takes and what to expect."""

from flax_resnet.config import TrainConfig

RECIPES: dict[str, TrainConfig] = {}
