"""Settings of data and augmentation."""

import os
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from flax_resnet.config.fields import (
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    PositiveCount,
    Probability,
    Share,
    dataclass,
    nearest,
)
from flax_resnet.config.policies import check_policy

PLACES = {"folder": "DIR", "cifar10": "PATH", "tfds": "NAME", "arrayrecord": "GLOB", "hf": "NAME"}
"""{kind of data set: what stands after its colon}"""


@dataclass
class DataConfig:
    dataset: Name = "digits"
    """Data set: digits | folder:DIR | cifar10:PATH | tfds:NAME | arrayrecord:GLOB |
    hf:NAME."""

    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Width and height of the network's input, in pixels. Default: the size of the first image if
    it is square and at most 64 pixels, else 224. A default below 16 becomes 16 if the network has a
    choice of stems and none is chosen."""

    resize_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Length in pixels to which the shorter side is resized before the centre crop. Default:
    `image_size`."""

    train_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Width and height in pixels of training images with `random_resized_crop`. Default:
    `image_size`."""

    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    """Filter that resizes images, as in Pillow and torchvision."""

    grayscale: bool = False
    """Convert the images to one channel. Otherwise image files have three, digits have one."""

    validation_fraction: Fraction = 0.1
    """Share of the training split that is held out for validation, every class in proportion, if
    the data set has no validation split."""

    test_fraction: Fraction = 0.2
    """Share of the images that is held out for the test, every class in proportion, if the data set
    has only one split."""

    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of the validation and test splits."""

    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Number of folds of a cross-validation, the parts into which the training split is cut: every
    class in proportion, shuffled by `split_seed`. A training of one fold needs `fold` too."""

    fold: Count | None = None
    """Number of the fold that is the test split, from 0 to `folds` - 1; the others are the training
    split. If the data set has a test split, it is left out."""

    train_images: PositiveCount | None = None
    """Largest number of training images to use, every class in proportion if it is enough for all
    classes."""

    eval_images: PositiveCount | None = None
    """Largest number of validation images to use, and of test images."""

    mean: tuple[pydantic.FiniteFloat, ...] | None = None
    """Mean of each channel, for pixels from 0 to 1. Default: measured on at most 50,000 training
    images."""

    std: tuple[Positive, ...] | None = None
    """Standard deviation of each channel, for pixels from 0 to 1. Default: measured like `mean`."""

    on_bad_image: Literal["error", "skip"] = "error"
    """Treatment of files that are not readable images: "error" ends the run and names them, "skip"
    lists them and leaves them out."""

    exif_transpose: bool = False
    """Turn images upright by their EXIF orientation, as viewers do; torchvision does not."""

    cache: Literal["auto", "device", "none"] = "auto"
    """Place where decoded images are kept. "device": training images on the device as uint8, the
    others in host memory. "none": nowhere, so every epoch decodes them again. "auto": as "device"
    for the splits that fit into `cache_gib`, the training split first."""

    cache_gib: Annotated[float, Field(ge=0, le=1e6)] = 2.0
    """Gibibytes of decoded images that `cache` "auto" keeps."""

    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """Order of the training images. "shuffle": every image once an epoch. "balanced": draws with
    replacement, in which all classes are equally frequent (torch's WeightedRandomSampler)."""

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
        if (self.folds is None) != (self.fold is None):
            raise ValueError("`folds` and `fold` are given together or not at all")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"`fold` {self.fold} does not exist: there are 0 to {self.folds - 1}")
        if self.resize_size and self.image_size and self.resize_size < self.image_size:
            raise ValueError("`resize_size` is smaller than `image_size`")
        scheme, colon, place = self.dataset.partition(":")
        if self.dataset != "digits" and not (scheme in PLACES and place):
            hint = nearest(scheme + colon, ("digits", *(f"{each}:" for each in PLACES)))
            if os.path.exists(os.path.expanduser(self.dataset)) or "/" in scheme:
                kind = "cifar10" if self.dataset.endswith(".gz") else "folder"
                hint = f"; did you mean {f'{kind}:{self.dataset}'!r}?"
            if scheme in PLACES and colon:
                hint = f": {PLACES[scheme]} is missing"
            raise ValueError(
                f"unknown data set {self.dataset!r}{hint} (digits,"
                f" {', '.join(f'{each}:{what}' for each, what in PLACES.items())})"
            )


@dataclass
class AugmentConfig:
    """Augmentation of training images in the order of the fields, as torchvision defines it."""

    random_resized_crop: bool = False
    """Crop a random area of random aspect ratio while decoding."""

    scale: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest area of the random resized crop, as shares of the image."""

    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of the random resized crop."""

    random_crop: Annotated[int, Field(ge=0, le=512)] | None = None
    """Pad by this many black pixels on each side and crop back at random; 0 is off. Default: an
    eighth of the image size, or 0 with `random_resized_crop`."""

    horizontal_flip: Probability = 0.0
    """Probability of a mirror image."""

    vertical_flip: Probability = 0.0
    """Probability of an image upside down."""

    auto_augment: Annotated[str, pydantic.AfterValidator(check_policy)] | None = None
    """Policy of automatic augmentation: torchvision's ta_wide (TrivialAugmentWide), ra
    (RandAugment), imagenet and cifar10 (AutoAugment), or timm's notation of RandAugment, such as
    rand-m7-mstd0.5-inc1. `interpolation` is its filter."""

    ra_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Magnitude of torchvision's RandAugment, from 0 to 30."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle of a random rotation, in degrees: the angle is uniform between its negative and
    it, and pixels are interpolated bilinearly."""

    brightness: NonNegative = 0.0
    """Strength x of the brightness jitter: its factor is uniform in [max(0, 1 - x), 1 + x]."""

    contrast: NonNegative = 0.0
    """Strength x of the contrast jitter: its factor is uniform in [max(0, 1 - x), 1 + x]."""

    saturation: NonNegative = 0.0
    """Strength x of the saturation jitter: its factor is uniform in [max(0, 1 - x), 1 + x]."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Strength x of the hue jitter: its shift is uniform in [-x, x], as a share of the hue
    circle."""

    random_erasing: Probability = 0.0
    """Probability of blanking a random rectangle (2% to 33% of the area), after normalising."""

    mixup: NonNegative = 0.0
    """Alpha of the Beta distribution of mixup's lambda; 0 is off. If `cutmix` is on too, each batch
    takes one of the two at random."""

    cutmix: NonNegative = 0.0
    """Alpha of the Beta distribution of the area that CutMix keeps of an image; 0 is off."""

    repeated_augmentation: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of copies of each image in a batch, each augmented in its own way (torchvision's
    RASampler). An epoch has as many batches as without copies, so it sees fewer images."""

    def __post_init__(self):
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"`{name}`: the smaller bound comes first, got {low:g} {high:g}")
