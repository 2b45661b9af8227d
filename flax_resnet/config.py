"""The settings of a run: frozen, keyword-only dataclasses that are checked when they are made.

Every field has one default, written here, and a docstring with its unit. The command line
(`cli.py`) makes its flags from these fields, so a name must be unique across all groups.
"""

import dataclasses
import difflib
import itertools
import json
import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import Field

from flax_resnet.errors import InputError
from flax_resnet.text import printable

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2",
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
    "basic_cnn",
]  # fmt: skip


WITH_SHORTCUTS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
"""The CIFAR networks of He et al. 2015, which exist with padded channels and with projections."""


def nearest(word: str, valid) -> str:
    """The end of an error message: "; did you mean X?", or the list of valid words."""
    close = difflib.get_close_matches(str(word), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(map(str, valid))}"


T = TypeVar("T")

INT32 = 2**31 - 1
"""The largest number that a compiled step counts to."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Bounds of the numbers that a compiled step takes; float32 holds them and their reciprocals."""


def _zero_or_normal(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"must be 0 or at least {SMALLEST:g}: float32 rounds smaller numbers to 0")
    return value


def _writable(text: str) -> str:
    """Raises ValueError for a name that config.json cannot hold."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the name is not in UTF-8 or holds a NUL: rename the file or folder")
    return text


Name = Annotated[str, pydantic.AfterValidator(_writable)]
# The largest value is below 1 in float32 too, so that 1 - value is never 0.
Fraction = Annotated[float, Field(ge=0, le=0.999999)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST), pydantic.AfterValidator(_zero_or_normal)]
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]
Factor = Annotated[float, Field(ge=1e-37, le=1)]
Count = Annotated[int, Field(ge=0, le=INT32)]
PositiveCount = Annotated[int, Field(ge=1, le=INT32)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]

_make_dataclass = pydantic.dataclasses.dataclass(
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True),
)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def _dataclass(cls: type[T]) -> type[T]:
    """A frozen, checked dataclass, which type checkers understand as one."""
    return _make_dataclass(cls)


@_dataclass
class ModelConfig:
    arch: Architecture = "resnet18"
    """Name of the network."""

    stem: Literal["imagenet", "cifar"] | None = None
    """First layers of torchvision's ten networks: "imagenet" (7x7 stride 2, max-pool) or "cifar"
    (3x3 stride 1, no pool). Default: "cifar" for images of 17 to 63 pixels, else "imagenet"."""

    shortcut: Literal["pad", "projection"] | None = None
    """Shortcuts where the width changes, in He's five networks for CIFAR: "pad" (option A: channels
    of zero) or "projection" (option B: 1x1 convolution and BatchNorm). Default: "pad"."""

    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Number of classes, which must be that of the data. Default: that of the data."""

    dropout: Fraction = 0.0
    """Probability of dropping a feature before the last linear layer."""

    zero_init_residual: bool = False
    """Start the last BatchNorm scale of every block at zero."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the computation. Parameters are float64 with "float64", else float32."""

    kernels: Literal["auto", "library"] = "auto"
    """Computation of the layers: "auto" uses this project's lowerings where they are faster on the
    platform that the program is compiled for, "library" JAX's and Flax's operations alone."""

    def __post_init__(self):
        if self.zero_init_residual and self.arch == "basic_cnn":
            raise ValueError("`zero_init_residual`: basic_cnn has no residual blocks")
        if self.shortcut and self.arch not in WITH_SHORTCUTS:
            raise ValueError(
                f"`shortcut`: {self.arch} has no choice; {', '.join(WITH_SHORTCUTS)} have"
            )


@_dataclass
class DataConfig:
    dataset: Name = "digits"
    """Data set: digits | folder:DIR | cifar10:PATH | tfds:NAME."""

    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pixels a side of the network's input. Default: the size of the first image if it is square
    and at most 64 pixels, else 224. A default below 16 becomes 16 where the network has a choice
    of stems and none is chosen."""

    resize_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pixels of the shorter side before the centre crop. Default: `image_size`."""

    grayscale: bool = False
    """Convert the images to one channel. Otherwise image files have three, digits have one."""

    validation_fraction: Fraction = 0.1
    """Stratified share of the training split held out for validation, where the data set has no
    validation split of its own."""

    test_fraction: Fraction = 0.2
    """Stratified share held out for the test, where the data set has one split only."""

    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the validation and test splits."""

    train_images: PositiveCount | None = None
    """Use at most this many training images (stratified where it is enough for every class)."""

    eval_images: PositiveCount | None = None
    """Use at most this many validation and test images each."""

    mean: tuple[pydantic.FiniteFloat, ...] | None = None
    """Mean of each channel, in [0, 1]. Default: measured on at most 50,000 training images."""

    std: tuple[Positive, ...] | None = None
    """Standard deviation of each channel, in [0, 1]. Default: measured as `mean` is."""

    on_bad_image: Literal["error", "skip"] = "error"
    """Treatment of files that are no readable images: "error" ends the run and names them, "skip"
    counts, lists and leaves them out."""

    exif_transpose: bool = False
    """Turn images upright by their EXIF orientation, as viewers do; torchvision does not."""

    cache: Literal["auto", "device", "none"] = "auto"
    """Place of decoded images. "device": training images on the device as uint8, the others in
    host memory. "none": every epoch decodes them again. "auto": as "device" for the splits that fit
    into `cache_gib`, the training split first."""

    cache_gib: Annotated[float, Field(ge=0, le=1e6)] = 2.0
    """Gibibytes of decoded images that `cache` "auto" keeps."""

    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that decode training images that are not cached. 0: threads of this process."""

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` are given together or not at all")
        for name in ("mean", "std"):
            for value in getattr(self, name) or ():
                if not 0 <= value <= 1:
                    raise ValueError(
                        f"`{name}` {value:g} is outside [0, 1]: pixels are divided by 255 first, so"
                        f" divide `{name}` by 255 too"
                    )
        if self.resize_size and self.image_size and self.resize_size < self.image_size:
            raise ValueError("`resize_size` is smaller than `image_size`")
        scheme, colon, place = self.dataset.partition(":")
        if self.dataset != "digits" and not (scheme in ("folder", "cifar10", "tfds") and place):
            hint = nearest(scheme + colon, ("digits", "folder:", "cifar10:", "tfds:"))
            if os.path.exists(os.path.expanduser(self.dataset)) or "/" in scheme:
                kind = "cifar10" if self.dataset.endswith(".gz") else "folder"
                hint = f"; did you mean {f'{kind}:{self.dataset}'!r}?"
            raise ValueError(
                f"unknown data set {self.dataset!r}{hint} (digits, folder:DIR, cifar10:PATH or"
                " tfds:NAME)"
            )


@_dataclass
class AugmentConfig:
    """Augmentation of training images in the order of the fields, as torchvision defines it."""

    random_resized_crop: bool = False
    """Crop a random area (8% to 100%) of random aspect ratio (3/4 to 4/3) while decoding."""

    random_crop: Annotated[int, Field(ge=0, le=512)] | None = None
    """Pad by this many black pixels on each side and crop back at random; 0 is off. Default: an
    eighth of the image size, or 0 with `random_resized_crop`."""

    horizontal_flip: Probability = 0.0
    """Probability of a mirror image."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle in degrees: angles are uniform in [-rotation, rotation], pixels bilinear."""

    brightness: NonNegative = 0.0
    """Jitter x of the brightness: a factor uniform in [max(0, 1 - x), 1 + x]."""

    contrast: NonNegative = 0.0
    """Jitter x of the contrast: a factor uniform in [max(0, 1 - x), 1 + x]."""

    saturation: NonNegative = 0.0
    """Jitter x of the saturation: a factor uniform in [max(0, 1 - x), 1 + x]."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Jitter x of the hue: a shift uniform in [-x, x], as a share of the hue circle."""

    random_erasing: Probability = 0.0
    """Probability of blanking a random rectangle (2% to 33% of the area), after normalising."""

    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution of mixup's lambda; 0 is off."""


@_dataclass
class OptimizerConfig:
    """Optimizer and loss, with PyTorch's definitions (`optim.py`)."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """Name of the optimizer."""

    lr: Positive = 0.04
    """Highest learning rate of the schedule."""

    momentum: Fraction = 0.9
    """Momentum of sgd and rmsprop."""

    nesterov: bool = True
    """Nesterov momentum of sgd."""

    beta1: Fraction = 0.9
    """Decay of the mean gradient in adam and adamw."""

    beta2: Fraction = 0.999
    """Decay of the mean squared gradient in adam and adamw."""

    alpha: Fraction = 0.99
    """Decay of the mean squared gradient in rmsprop."""

    centered: bool = False
    """Subtract the mean gradient in rmsprop."""

    eps: Positive = 1e-8
    """Term added to the square root in the denominator of adam, adamw and rmsprop."""

    weight_decay: NonNegative = 5e-4
    """Weight decay, coupled (L2, added to the gradient) except in adamw and with
    `decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """Shrink the weights by lr * weight_decay in every optimizer."""

    decay_norm_and_bias: bool = True
    """Decay BatchNorm parameters and biases too, as torch.optim does by default."""

    l1: NonNegative = 0.0
    """Factor of the sum of absolute weights that is added to the loss."""

    label_smoothing: Fraction = 0.1
    """Share of the target spread evenly over all classes."""

    clip_norm: NonNegative = 0.0
    """Largest global norm of the gradients; 0 is off."""

    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of batches whose gradients are averaged into one update."""

    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights, which evaluation uses; 0 is off."""


@_dataclass
class ScheduleConfig:
    """Learning rate over the epochs, with PyTorch's definitions (`optim.py`)."""

    schedule: Literal["constant", "step", "multistep", "cosine", "onecycle", "plateau"] = "onecycle"
    """Name of the learning rate's schedule."""

    warmup_epochs: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Epochs of linear warm-up before the schedule starts."""

    warmup_factor: Factor = 0.01
    """First learning rate of the warm-up, as a share of the schedule's first one (with onecycle,
    `lr` / `div_factor`)."""

    step_epochs: Epochs = 30
    """Epochs between two cuts of the step schedule."""

    milestones: tuple[Epochs, ...] = (100, 150)
    """Epochs at which the multistep schedule cuts."""

    gamma: Factor = 0.1
    """Factor of a cut in the step, multistep and plateau schedules."""

    min_lr: NonNegative = 0.0
    """Lowest learning rate of the cosine and plateau schedules."""

    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the steps in which onecycle's learning rate rises."""

    div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 25.0
    """Ratio of onecycle's highest learning rate to its initial one."""

    final_div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 1e4
    """Ratio of onecycle's initial learning rate to its final one."""

    cycle_momentum: bool = False
    """Let onecycle move the momentum from 0.95 to 0.85 and back, against the learning rate."""

    plateau_patience: Count = 10
    """Epochs without improvement before the plateau schedule cuts."""

    plateau_threshold: NonNegative = 1e-4
    """Relative change that the plateau schedule counts as an improvement."""

    plateau_cooldown: Count = 0
    """Epochs that the plateau schedule waits after a cut."""

    def __post_init__(self):
        if not self.milestones:
            raise ValueError("`milestones`: at least one is needed")
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            given = " ".join(map(str, self.milestones))
            raise ValueError(
                f"`milestones`: each must be later than the one before it, got {given}"
            )


@_dataclass
class EarlyStoppingConfig:
    patience: Count = 0
    """Epochs without improvement before the run stops; 0 never stops it."""

    monitor: Literal["validation_loss", "validation_accuracy", "validation_f1_macro"] = (
        "validation_loss"
    )
    """Metric that drives the best checkpoint, early stopping and the plateau schedule."""

    min_delta: NonNegative = 0.0
    """Absolute change of the metric that counts as an improvement."""

    restore_best: bool = True
    """Report on and export the best weights instead of the last."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more is better."""
        return "min" if self.monitor == "validation_loss" else "max"


@_dataclass
class ParallelConfig:
    parallel: Literal["auto", "jit", "pmap"] = "auto"
    """Transformation that runs a step on all devices: jit over a mesh, or pmap. "auto" is jit."""

    devices: PositiveCount | None = None
    """Number of devices. Default: all."""

    shard_parameters: bool = False
    """Shard parameters and optimizer state over the devices instead of replicating them (FSDP):
    less memory, the same numbers. Not under pmap."""

    steps_per_dispatch: PositiveCount | None = None
    """Training steps in a dispatch. Default: 20 if the images are on a GPU or TPU, else 1."""


@_dataclass
class TrainConfig:
    """All settings of a run. Every field has a default, and the config is checked when it is made.

    Raises:
      pydantic.ValidationError: a value out of range or settings that exclude each other.

    Example:
      >>> config = flax_resnet.TrainConfig(epochs=2, data={"dataset": "folder:birds"})
      >>> config.optimizer.lr
      0.04
    """

    epochs: Epochs = 16
    """Passes over the training split."""

    batch_size: BatchSize = 128
    """Images in a training step, over all devices."""

    eval_batch_size: BatchSize = 256
    """Images in an evaluation step, over all devices."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed for initialization, data order, augmentation and dropout."""

    init_from: Name | None = None
    """Run directory or weights file to fine-tune. The head is new where the number of classes
    differs. Only weights are taken: network and normalisation are those of the flags."""

    weights_key: Name | None = None
    """Key or prefix of the network in the file of `init_from`, such as "state_dict" or "encoder_k".
    Default: the only network, or the only one that is not an average."""

    ema: bool = False
    """Fine-tune the averaged weights of the file of `init_from`, where it holds raw ones too."""

    new_head: bool = False
    """Fine-tune with a new head even where the old one would fit."""

    freeze_backbone: bool = False
    """Fine-tune the last linear layer only; BatchNorm keeps its statistics."""

    log_steps: PositiveCount = 20
    """Steps between two checks and logs of the loss."""

    checkpoint_epochs: PositiveCount = 1
    """Epochs between two checkpoints; every improvement is kept as well."""

    skip_nonfinite: Count = 0
    """Consecutive updates with non-finite gradients that are skipped before the run stops."""

    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/flax_resnet for the next start."""

    deterministic: bool = False
    """Use only operations that give the same bits on a GPU too, at some cost. Not under pmap."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)

    def __post_init__(self):
        data, optimizer = self.data, self.optimizer
        for name in ("weights_key", "ema", "new_head", "freeze_backbone"):
            if getattr(self, name) and not self.init_from:
                raise ValueError(f"`{name}` is for fine-tuning: it needs `init_from`")
        if self.augment.random_resized_crop and data.cache == "device":
            raise ValueError("`random_resized_crop` decodes files anew: `cache` device has no use")
        if self.schedule.cycle_momentum and self.schedule.schedule != "onecycle":
            given = self.schedule.schedule
            raise ValueError(f"`cycle_momentum` needs `schedule` onecycle, got {given}")
        if self.deterministic and self.model.kernels == "library":
            raise ValueError(
                "`deterministic` needs `kernels` auto: on a GPU the library's max-pool has no"
                " deterministic gradient"
            )
        still = optimizer.optimizer in ("sgd", "rmsprop") and not optimizer.momentum
        if self.schedule.cycle_momentum and still:
            raise ValueError(f"`cycle_momentum`: {optimizer.optimizer} has `momentum` 0")


USED_WITH = {
    "momentum": ("optimizer", "sgd", "rmsprop"),
    "nesterov": ("optimizer", "sgd"),
    "beta1": ("optimizer", "adam", "adamw"),
    "beta2": ("optimizer", "adam", "adamw"),
    "alpha": ("optimizer", "rmsprop"),
    "centered": ("optimizer", "rmsprop"),
    "eps": ("optimizer", "adam", "adamw", "rmsprop"),
    "decoupled_weight_decay": ("weight_decay",),
    "decay_norm_and_bias": ("weight_decay",),
    "warmup_factor": ("warmup_epochs",),
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
    "cache_gib": ("cache", "auto"),
    "on_bad_image": ("dataset", "folder"),
    "exif_transpose": ("dataset", "folder", "tfds"),
    "grayscale": ("dataset", "folder", "cifar10", "tfds"),
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


def _by_name(config):
    return {name.rpartition(".")[2]: value for name, value in flat(config).items()}


def to_dict(config: TrainConfig) -> dict:
    """The config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: TrainConfig) -> dict:
    """The config as one flat dict: {"seed": 0, "model.arch": "resnet18", ...}."""
    facts = {}
    for name, value in to_dict(config).items():
        group = {f"{name}.{key}": v for key, v in value.items()} if type(value) is dict else {}
        facts |= group or {name: value}
    return facts


def finite(value):
    """The JSON value with None for every number that is not finite, which JSON cannot hold."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def from_dict(values: dict) -> TrainConfig:
    """The inverse of `to_dict`; missing fields take their defaults.

    Raises:
      InputError: an unknown key, a wrong type or a value out of range; one line names each.
    """
    try:
        text = json.dumps(values, ensure_ascii=False).encode()
        return pydantic.TypeAdapter(TrainConfig).validate_json(text, strict=True)
    except UnicodeEncodeError as error:
        raise InputError(f"{error.object[: error.end][-30:]!a} is not in UTF-8") from None
    except pydantic.ValidationError as error:
        raise InputError("; ".join(_describe(fault) for fault in error.errors())) from None


_LONGEST_CONFIG = 2**24  # characters: a device has no end


def config_from_file(path: Path | str) -> TrainConfig:
    """Read a config from a JSON file, strictly: known keys, each given once, with valid values."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            values = json.loads(file.read(_LONGEST_CONFIG), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    try:
        return from_dict(values)
    except (InputError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from None


def _each_once(pairs: list[tuple]) -> dict:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{printable(name)} is given twice")
        values[name] = value
    return values


def _describe(fault: dict) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, got {fault['input']!r:.80}"
