"""What a run is: frozen, keyword-only dataclasses, checked when they are made.

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
"""Of He et al. 2015, who tried padded channels and projections."""


def nearest(word: str, valid) -> str:
    """'; did you mean X?' or the list of what is valid, to end an error message with."""
    close = difflib.get_close_matches(str(word), list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(map(str, valid))}"


T = TypeVar("T")

INT32 = 2**31 - 1
"""What a compiled step counts with."""

SMALLEST, LARGEST = 1e-30, 1e30
"""Of numbers that a compiled step takes: their quotients are numbers in float32 too."""


def _zero_or_normal(value: float) -> float:
    if 0 < value < SMALLEST:
        raise ValueError(f"between 0 and {SMALLEST:g}, which a step in float32 takes for 0")
    return value


def _writable(text: str) -> str:
    """What a run could not write into its config, and so not read again, is no name of anything."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("a name that is not in UTF-8, or holds a NUL: rename what it stands for")
    return text


Name = Annotated[str, pydantic.AfterValidator(_writable)]
# Below 1 in float32 too, and so far that nothing is divided by 0.
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
    """Which network."""

    stem: Literal["imagenet", "cifar"] | None = None
    """First layers of torchvision's ten: "imagenet" (7x7 stride 2, max-pool) or "cifar" (3x3
    stride 1, no pool). Left out: "cifar" for images of 17 to 63 pixels, else "imagenet"."""

    shortcut: Literal["pad", "projection"] | None = None
    """Of He's five for CIFAR, where the width changes: "pad" (option A: channels of zero) or
    "projection" (option B: 1x1 convolution and BatchNorm). Left out: "pad"."""

    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Left out: as many as the data has; another number than that is an error."""

    dropout: Fraction = 0.0
    """Probability of dropping a feature before the last linear layer."""

    zero_init_residual: bool = False
    """Start the last BatchNorm scale of every block at zero."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Computation; parameters are float32, and float64 only with float64."""

    kernels: Literal["auto", "library"] = "auto"
    """How layers are computed. "auto": in this project's own way where that is faster on the
    platform the program is compiled for. "library": by JAX's and Flax's operations alone."""

    def __post_init__(self):
        if self.zero_init_residual and self.arch == "basic_cnn":
            raise ValueError("zero_init_residual: basic_cnn has no residual blocks")
        if self.shortcut and self.arch not in WITH_SHORTCUTS:
            raise ValueError(f"shortcut is of {', '.join(WITH_SHORTCUTS)}, not of {self.arch}")


@_dataclass
class DataConfig:
    dataset: Name = "digits"
    """digits | folder:DIR | cifar10:PATH | tfds:NAME."""

    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pixels a side of what the network sees. Left out: the size of the first image if it is
    square and at most 64 pixels, else 224; smaller than 16 and with both sizes of the stem left
    open, they are enlarged to 16."""

    resize_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pixels of the shorter side before the centre crop. Left out: image_size."""

    grayscale: bool = False
    """Turn the images to one channel. Without it image files have three; digits have one."""

    validation_fraction: Fraction = 0.1
    """Stratified share of the training split held out for validation, where the set has no
    validation split of its own."""

    test_fraction: Fraction = 0.2
    """Stratified share held out for the test, where the set has one split only."""

    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of these two splits."""

    train_images: PositiveCount | None = None
    """Use at most this many training images (stratified where it is enough for every class)."""

    eval_images: PositiveCount | None = None
    """Use at most this many validation and test images each."""

    mean: tuple[pydantic.FiniteFloat, ...] | None = None
    """Per channel, of images in [0, 1]. Left out: measured on the training split, of
    more than 50,000 images on so many."""

    std: tuple[Positive, ...] | None = None
    """Per channel, of images in [0, 1]. Left out: measured on the training split, of
    more than 50,000 images on so many."""

    on_bad_image: Literal["error", "skip"] = "error"
    """"error": a file that is no image ends the run, named. "skip": such files are counted,
    listed and left out."""

    exif_transpose: bool = False
    """Turn images upright by their EXIF orientation, as viewers do; torchvision does not."""

    cache: Literal["auto", "device", "none"] = "auto"
    """Where decoded images live: those of the training on the device as uint8 and the others in
    memory, or nowhere (every epoch decodes them again). "auto": so many splits as take at most
    cache_gib together, the training images first."""

    cache_gib: Annotated[float, Field(ge=0, le=1e6)] = 2.0
    """Gibibytes that "auto" may spend."""

    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that decode the training images that are not cached. 0: threads of this
    process."""

    def __post_init__(self):
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        for name in ("mean", "std"):
            for value in getattr(self, name) or ():
                if not 0 <= value <= 1:
                    raise ValueError(
                        f"{name} {value:g} is not of images in [0, 1]: pixels are divided by 255"
                        f" first, so divide {name} by 255 too"
                    )
        if self.resize_size and self.image_size and self.resize_size < self.image_size:
            raise ValueError("resize_size is smaller than image_size")
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
    """Training only; each with torchvision's definition, in this order."""

    random_resized_crop: bool = False
    """Random area (8% to 100%) and aspect ratio (3/4 to 4/3), while decoding."""

    random_crop: Annotated[int, Field(ge=0, le=512)] | None = None
    """Pad by this many black pixels on each side and crop back at random; 0 is off. Left out: an
    eighth of the image size, or 0 with random_resized_crop."""

    horizontal_flip: Probability = 0.0
    """Probability of a mirror image."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Degrees; the angle is uniform in [-rotation, rotation], sampled bilinearly."""

    brightness: NonNegative = 0.0
    """Colour jitter: factor uniform in [max(0, 1 - x), 1 + x]."""

    contrast: NonNegative = 0.0
    """Colour jitter: factor uniform in [max(0, 1 - x), 1 + x]."""

    saturation: NonNegative = 0.0
    """Colour jitter: factor uniform in [max(0, 1 - x), 1 + x]."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Colour jitter: shift uniform in [-x, x], as a share of the hue circle."""

    random_erasing: Probability = 0.0
    """Probability of blanking a random rectangle (2% to 33% of the area), after normalising."""

    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution of mixup's lambda; 0 is off."""


@_dataclass
class OptimizerConfig:
    """PyTorch's definitions (`optim.py`)."""

    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """Which optimizer."""

    lr: Positive = 0.04
    """Learning rate at its highest."""

    momentum: Fraction = 0.9
    """sgd and rmsprop."""

    nesterov: bool = True
    """sgd only."""

    beta1: Fraction = 0.9
    """adam and adamw."""

    beta2: Fraction = 0.999
    """adam and adamw."""

    alpha: Fraction = 0.99
    """rmsprop: decay of the squared gradient."""

    centered: bool = False
    """rmsprop: subtract the mean gradient."""

    eps: Positive = 1e-8
    """adam, adamw and rmsprop; outside the square root."""

    weight_decay: NonNegative = 5e-4
    """Coupled (L2, added to the gradient) except for adamw and decoupled_weight_decay."""

    decoupled_weight_decay: bool = False
    """Shrink the weights by lr * weight_decay instead, whatever the optimizer."""

    decay_norm_and_bias: bool = True
    """Decay BatchNorm parameters and biases too, as torch.optim does by default."""

    l1: NonNegative = 0.0
    """Factor of the sum of absolute weights added to the loss."""

    label_smoothing: Fraction = 0.1
    """Share of the target spread evenly over all classes."""

    clip_norm: NonNegative = 0.0
    """Largest global gradient norm; 0 is off."""

    accumulate_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Batches whose gradients are averaged into one update."""

    ema_decay: Fraction = 0.0
    """Exponential moving average of the weights, used for evaluation; 0 is off."""


@_dataclass
class ScheduleConfig:
    """PyTorch's definitions (`optim.py`); lengths in epochs."""

    schedule: Literal["constant", "step", "multistep", "cosine", "onecycle", "plateau"] = "onecycle"
    """Course of the learning rate."""

    warmup_epochs: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Linear warm-up before the schedule starts."""

    warmup_factor: Factor = 0.01
    """Share of the schedule's first learning rate at which the warm-up starts; with onecycle that
    rate is lr / div_factor."""

    step_epochs: Epochs = 30
    """step: epochs between two cuts."""

    milestones: tuple[Epochs, ...] = (100, 150)
    """multistep: epochs at which to cut."""

    gamma: Factor = 0.1
    """step, multistep and plateau: factor of a cut."""

    min_lr: NonNegative = 0.0
    """cosine and plateau: where the learning rate ends."""

    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """onecycle: share of the steps spent rising."""

    div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 25.0
    """onecycle: lr / initial learning rate."""

    final_div_factor: Annotated[float, Field(ge=0.001, le=LARGEST)] = 1e4
    """onecycle: initial / final learning rate."""

    cycle_momentum: bool = False
    """onecycle: move the momentum from 0.95 to 0.85 and back, against the learning rate."""

    plateau_patience: Count = 10
    """plateau: epochs without improvement before a cut."""

    plateau_threshold: NonNegative = 1e-4
    """plateau: relative change that counts as an improvement."""

    plateau_cooldown: Count = 0
    """plateau: epochs to wait after a cut."""

    def __post_init__(self):
        if not self.milestones:
            raise ValueError("milestones: at least one")
        if any(a >= b for a, b in itertools.pairwise(self.milestones)):
            given = " ".join(map(str, self.milestones))
            raise ValueError(
                f"milestones: each has to be later than the one before it, got {given}"
            )


@_dataclass
class EarlyStoppingConfig:
    patience: Count = 0
    """Epochs without improvement before the run stops; 0 never stops it."""

    monitor: Literal["validation_loss", "validation_accuracy", "validation_f1_macro"] = (
        "validation_loss"
    )
    """What is watched: for the best checkpoint, early stopping and the plateau schedule."""

    min_delta: NonNegative = 0.0
    """Absolute change that counts as an improvement."""

    restore_best: bool = True
    """Report on and export the best weights instead of the last."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more is better."""
        return "min" if self.monitor == "validation_loss" else "max"


@_dataclass
class ParallelConfig:
    parallel: Literal["auto", "jit", "pmap"] = "auto"
    """One step over all devices: jit over a mesh, or pmap. "auto" is jit."""

    devices: PositiveCount | None = None
    """How many. Left out: all."""

    shard_parameters: bool = False
    """Keep parameters and the optimizer's state in parts, one a device, instead of whole on each
    (FSDP): less memory, the same numbers. Not under pmap."""

    steps_per_dispatch: PositiveCount | None = None
    """Training steps sent to the device at once. Left out: 20 where the images lie on a GPU, else
    1."""


@_dataclass
class TrainConfig:
    """All settings of a run; every field has a default, and the whole is checked when it is made.

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
    """Images a step, over all devices."""

    eval_batch_size: BatchSize = 256
    """Images a step of an evaluation."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of weights, order, augmentation and dropout."""

    init_from: Name | None = None
    """Fine-tune: a run directory or weights file to start from; the head is new where the number
    of classes differs. Only weights are taken: network and normalisation are those of the flags."""

    weights_key: Name | None = None
    """Fine-tune: which of the networks in the file of init_from, by the key or prefix that it lies
    under, as "state_dict" or "encoder_k". Left out: the only one, or the one that is no average."""

    ema: bool = False
    """Fine-tune: take the averaged weights in the file of init_from, where raw ones lie beside
    them."""

    new_head: bool = False
    """Fine-tune: start from a new head even where the old one would fit."""

    freeze_backbone: bool = False
    """Train the last linear layer only; BatchNorm keeps its statistics."""

    log_steps: PositiveCount = 20
    """Steps between two looks at the loss."""

    checkpoint_epochs: PositiveCount = 1
    """Epochs between two checkpoints; every improvement is kept as well."""

    skip_nonfinite: Count = 0
    """How many updates in a row with a non-finite gradient are skipped before the run stops."""

    compilation_cache: bool = True
    """Keep compiled programs in ~/.cache/flax_resnet for the next start."""

    deterministic: bool = False
    """Bit-for-bit repeatable on a GPU too, at some cost. Not under pmap."""

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
                raise ValueError(f"{name} is of a fine-tuning: it needs init_from")
        if self.augment.random_resized_crop and data.cache == "device":
            raise ValueError("random_resized_crop decodes every file anew: cache device has no use")
        if self.schedule.cycle_momentum and self.schedule.schedule != "onecycle":
            raise ValueError(f"cycle_momentum is of onecycle, not of {self.schedule.schedule}")
        if self.deterministic and self.model.kernels == "library":
            raise ValueError(
                "deterministic needs kernels auto: on a GPU the library's max-pool has no"
                " deterministic gradient"
            )
        still = optimizer.optimizer in ("sgd", "rmsprop") and not optimizer.momentum
        if self.schedule.cycle_momentum and still:
            raise ValueError(f"cycle_momentum: {optimizer.optimizer} has momentum 0, none to move")


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
"""{field: another one, and which of its values make use of the first; by default all but 0}."""


def idle(config: TrainConfig) -> dict[str, str]:
    """{field: what is wrong} of those that differ from their default and have no effect."""
    values, defaults = (_by_name(each) for each in (config, TrainConfig()))
    faults = {}
    for name, (other, *users) in USED_WITH.items():
        used = str(values[other]).partition(":")[0] in users if users else values[other]
        if values[name] != defaults[name] and not used:
            wanted = f"{other} {' or '.join(users) if users else 'above 0'}"
            faults[name] = f"{name} has no effect with {other} {values[other]}: it needs {wanted}"
    return faults


def _by_name(config):
    return {name.rpartition(".")[2]: value for name, value in flat(config).items()}


def to_dict(config: TrainConfig) -> dict:
    """The config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(config: TrainConfig) -> dict:
    """{"seed": 0, "model.arch": "resnet18", ...}"""
    facts = {}
    for name, value in to_dict(config).items():
        group = {f"{name}.{key}": v for key, v in value.items()} if type(value) is dict else {}
        facts |= group or {name: value}
    return facts


def finite(value):
    """A JSON value with None for every number that is not finite, which JSON does not have."""
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
    """A config from a JSON file, strictly: every key known, every value of its type."""
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
    return f"{name}: {fault['msg']}, got {fault['input']!r:.80}"
