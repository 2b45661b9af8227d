"""Settings that have no effect because of others, or need a validation split."""

from flax_resnet.config.files import flat
from flax_resnet.config.optimization import EarlyStoppingConfig
from flax_resnet.config.train import TrainConfig
from flax_resnet.errors import InputError

USED_WITH = {
    "precision": ("dtype", "float32"),
    "momentum": ("optimizer", "sgd", "rmsprop"),
    "nesterov": ("optimizer", "sgd"),
    "beta1": ("optimizer", "adam", "adamw", "lamb"),
    "beta2": ("optimizer", "adam", "adamw", "lamb"),
    "alpha": ("optimizer", "rmsprop"),
    "centered": ("optimizer", "rmsprop"),
    "eps": ("optimizer", "adam", "adamw", "rmsprop", "lamb"),
    "bce_threshold": ("loss", "bce"),
    "decoupled_weight_decay": ("weight_decay",),
    "decay_norm_and_bias": ("weight_decay",),
    "warmup_factor": ("warmup_epochs",),
    "warmup_within": ("schedule", "cosine"),
    "ema_steps": ("ema_decay",),
    "ema_after_warmup": ("ema_decay",),
    "step_epochs": ("schedule", "step"),
    "milestones": ("schedule", "multistep"),
    "gamma": ("schedule", "step", "multistep", "plateau"),
    "min_lr": ("schedule", "cosine", "plateau"),
    "pct_start": ("schedule", "onecycle"),
    "div_factor": ("schedule", "onecycle"),
    "final_div_factor": ("schedule", "onecycle"),
    "plateau_patience": ("schedule", "plateau"),
    "plateau_threshold": ("schedule", "plateau"),
    "plateau_cooldown": ("schedule", "plateau"),
    "min_delta": ("patience",),
    "train_size": ("random_resized_crop",),
    "scale": ("random_resized_crop",),
    "ratio": ("random_resized_crop",),
    "ra_magnitude": ("auto_augment", "ra"),
    "cache_gib": ("cache", "auto"),
    "on_bad_image": ("dataset", "folder"),
    "exif_transpose": ("dataset", "folder", "tfds", "arrayrecord", "hf"),
    "grayscale": ("dataset", "folder", "cifar10", "tfds", "arrayrecord", "hf"),
}
"""{field: (another field, the values of it with which the first has an effect; none: all but 0)}"""


def idle(config: TrainConfig) -> dict[str, str]:
    """{field: message} of the settings that differ from their default and have no effect."""
    values, defaults = (_by_name(each) for each in (config, TrainConfig()))
    faults = {}
    for name, (other, *users) in USED_WITH.items():
        used = str(values[other]).partition(":")[0] in users if users else values[other]
        if values[name] != defaults[name] and not used:
            wanted = f"`{other}` {' or '.join(users) if users else 'above 0'}"
            given = f"`{other}` {values[other]}"
            faults[name] = f"`{name}` has no effect with {given}: it needs {wanted}"
    return faults


def check_unvalidated(config: TrainConfig):
    """Raises InputError for settings that need a validation split, for data without one."""
    stopping = config.early_stopping
    watching = {
        "early stopping": stopping.patience,
        "the plateau schedule": config.schedule.schedule == "plateau",
        f"`monitor` {stopping.monitor}": stopping.monitor != EarlyStoppingConfig().monitor,
    }
    for what, asked in watching.items():
        if asked:
            raise InputError(f"{what} needs a validation split: give `validation_fraction` above 0")


def _by_name(config):
    return {name.rpartition(".")[2]: value for name, value in flat(config).items()}
