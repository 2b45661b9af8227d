"""Weights and images that expose a wrong port.

Freshly initialised BatchNorms (1, 0, 0, 1) hide swapped parameters. Square images hide swapped
axes. Sizes that are all odd or all even hide a wrong padding (`sizes.py`). Constant images hide
nearly everything. All values fit in float32, so the same arrays serve float64 and float32 tests.

Names and layouts of arrays are torch's: `layer1.0.conv1.weight` [O, I, kh, kw]. B batch, H height,
W width, C channels, S steps.
"""

import dataclasses
import functools
import os
import re

import numpy as np

from flax_resnet.config import WITH_SHORTCUTS, OptimizerConfig
from flax_resnet.text import listed

NUM_CLASSES = 7

CIFAR10 = os.environ.get("CIFAR10_IMAGES")
"""All of CIFAR-10 for the long tests: a folder with train/CLASS/*.jpg and test/CLASS/*.jpg."""

SEED = 0
"""Seed of all random inputs; set by `pytest --inputs-seed N`."""


def random_numbers(seed=0) -> np.random.Generator:
    """A random generator for one test."""
    return np.random.default_rng([SEED, seed])


MOST_VALUES = 20_000
"""Values per channel up to which n / (n - 1) changes a variance by 5e-5 or more."""

RESIDUAL_END = 0.3
"""Scale of the last BatchNorm of a residual branch. The sum over 54 blocks then stays at a few
times 1; with a scale of 1 each block would double the variance and saturate the loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Weights, batches and training options that both frameworks run on."""

    arch: str

    arrays: dict[str, np.ndarray]
    """The state before the first step, as torch's state_dict."""

    images: np.ndarray
    """The images of every step, [S, B, H, W, C]."""

    labels: np.ndarray
    """The labels of every step, [S, B]."""

    stem: str | None = None

    shortcut: str | None = None

    kernels: str = "auto"
    """The lowerings that flax_resnet uses, as `ModelConfig.kernels`."""

    num_classes: int = NUM_CLASSES

    batch_norm_images: int | None = None
    """Images that share BatchNorm's statistics, as `ModelConfig.batch_norm_images`."""

    dropout: float = 0.0

    masks: np.ndarray | None = None
    """The dropout masks [S, B, F], True where a feature before the last layer is kept."""

    rule: dict = dataclasses.field(default_factory=dict)
    """Options of the optimizer and the loss, under the names of `OptimizerConfig`."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The rule as a config, without label smoothing unless the rule sets it."""
        return OptimizerConfig(**{"label_smoothing": 0.0} | self.rule)


def make_case(
    arch,
    *,
    stem=None,
    shortcut=None,
    size=None,
    batch=2,
    steps=1,
    dropout=0.0,
    zero_init=False,
    kernels="auto",
    batch_norm_images=None,
    seed=0,
    **rule,
) -> Case:
    """A random case with none of the `faults` that would hide a difference.

    Args:
      size: (H, W); None: `image_size(arch, stem)`.
      zero_init: the last scale of every residual branch is 0, as with zero_init_residual. Inputs
        of the block's last ReLU are then exactly 0 in places.
      rule: options of the optimizer and the loss; none: `RULE`.
    """
    rng = random_numbers(seed)
    shapes = state_shapes(arch, stem, shortcut)
    images = rng.standard_normal((steps, batch, *(size or image_size(arch, stem)), 3), np.float32)
    features = shapes["fc.weight"][1]
    case = Case(
        arch=arch,
        stem=stem,
        shortcut=shortcut,
        kernels=kernels,
        batch_norm_images=batch_norm_images,
        arrays=random_state(shapes, rng, zero_init=zero_init),
        images=images,
        labels=rng.integers(0, NUM_CLASSES, (steps, batch)),
        dropout=dropout,
        masks=rng.random((steps, batch, features)) >= dropout if dropout else None,
        rule=rule or RULE,
    )
    return _able_to_fail(case, zero_init=zero_init)


def _able_to_fail(case: Case, *, zero_init=False) -> Case:
    if found := faults(case, zero_init=zero_init):
        raise ValueError(f"inputs that cannot fail: {listed(found)}")
    return case


RULE = dict(lr=1e-3, momentum=0.9, weight_decay=5e-4, label_smoothing=0.1)


def case_of_weights(
    arrays: dict, arch: str, stem: str | None, shortcut: str | None = None, *, size=None
) -> Case:
    """A case of given, trained weights and random images.

    Raises:
      ValueError: the case could not fail; the message says why.
    """
    rng = random_numbers()
    shape = (1, 4, *(size or image_size(arch, stem)), arrays["conv1.weight"].shape[1])
    classes = len(arrays["fc.bias"])
    case = Case(
        arch=arch,
        stem=stem,
        shortcut=shortcut,
        arrays=arrays,
        num_classes=classes,
        images=rng.standard_normal(shape, np.float32),
        labels=rng.integers(0, classes, shape[:2]),
        rule=RULE,
    )
    return _able_to_fail(case)


def image_size(arch: str, stem: str | None) -> tuple[int, int]:
    """(H, W), one even and one odd in every strided layer.

    The first stage of torchvision's networks gets 12 x 13 with both stems.
    """
    if arch == "basic_cnn":
        return 30, 41
    large = arch not in WITH_SHORTCUTS and stem != "cifar"
    # 47, 24, 12, 6, 3 and 50, 25, 13, 7, 4: one of the two is even and the other odd.
    return (47, 50) if large else (12, 13)


def state_shapes(
    arch: str, stem: str | None = None, shortcut: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch network's state, in torch's order."""
    state = _without_weights(arch, stem, shortcut).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@functools.cache
def _without_weights(arch: str, stem: str | None, shortcut: str | None, in_channels=3):
    import torch  # an extra; the benchmark draws weights without it

    import torch_ref

    with torch.device("meta"):
        return torch_ref.create_model(arch, NUM_CLASSES, in_channels, stem=stem, shortcut=shortcut)


def random_state(shapes: dict, rng: np.random.Generator, *, zero_init=False) -> dict:
    """Random arrays under the names of `shapes`; no two are equal."""
    norms = {name.removesuffix(".running_var") for name in shapes if name.endswith("running_var")}
    arrays = {name: _random_entry(name, shapes[name], norms, rng) for name in shapes}
    for name in residual_ends(shapes):
        arrays[f"{name}.weight"] *= np.float32(0 if zero_init else RESIDUAL_END)
        arrays[f"{name}.bias"] *= np.float32(0 if zero_init else 1)
    return arrays


def residual_ends(shapes) -> list[str]:
    """Names of the last BatchNorms of residual branches: bn3 of a bottleneck, else bn2."""
    blocks = sorted({m[0] for name in shapes if (m := re.match(r"layer\d\.\d+", name))})
    return [f"{b}.bn3" if f"{b}.bn3.weight" in shapes else f"{b}.bn2" for b in blocks]


def _random_entry(name, shape, norms, rng) -> np.ndarray:
    layer, leaf = name.rsplit(".", 1)
    if leaf == "num_batches_tracked":
        return np.array(rng.integers(1, 1000))
    if leaf == "running_var" or (layer in norms and leaf == "weight"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 4:
        std = (2 / (shape[0] * shape[2] * shape[3])) ** 0.5  # He's, by fan-out
    else:
        std = shape[1] ** -0.5 if len(shape) == 2 else 0.3
    return rng.standard_normal(shape, np.float32) * np.float32(std)


def faults(case: Case, *, zero_init=False) -> list[str]:
    """Reasons why a case could hide a difference between the frameworks; [] if there are none."""
    return [
        *_image_faults(case.images),
        *_size_faults(case),
        *_state_faults(case.arrays, zero_init),
    ]


def _size_faults(case: Case) -> list[str]:
    from equivalence_tests.parity import sizes  # with torch, as above

    *_, height, width, channels = case.images.shape
    net = _without_weights(case.arch, case.stem, case.shortcut, channels)
    return sizes.faults(net, [(height, width)], channels)


def _image_faults(images) -> list[str]:
    steps, batch, height, width, _ = images.shape
    flat = images.reshape(steps * batch, height, width, -1)
    checks = {
        "H and W are equal": height == width,
        "H and W are both odd": height % 2 == width % 2 == 1,
        "a constant image": any(np.ptp(image, axis=(0, 1)).min() == 0 for image in flat),
        "an image is its own mirror image": any((x == x[:, ::-1]).all() for x in flat),
        "two equal images": len({image.tobytes() for image in flat}) < len(flat),
        "too many values to see n / (n - 1)": batch * height * width > MOST_VALUES,
        "images do not fit in float32": not _fits(images),
    }
    return [fault for fault, found in checks.items() if found]


def _state_faults(arrays, zero_init) -> list[str]:
    found = [f"{name} does not fit in float32" for name, a in arrays.items() if not _fits(a)]
    exempt = {f"{end}.{leaf}" for end in residual_ends(arrays) for leaf in ("weight", "bias")}
    for name, array in arrays.items():
        if array.size > 1 and np.ptp(array) == 0 and not (zero_init and name in exempt):
            found.append(f"{name} is constant")
        if array.ndim == 4 and array.shape[2] > 1 and (array == array.swapaxes(2, 3)).all():
            found.append(f"{name} is its own transpose")
    vectors = {}
    for name, array in arrays.items():
        if array.ndim == 1 and not (zero_init and name in exempt):
            vectors.setdefault(array.tobytes(), []).append(name)
    found += [f"{' and '.join(same)} are equal" for same in vectors.values() if len(same) > 1]
    return found


def _fits(array) -> bool:
    return array.dtype.kind == "i" or bool((array == array.astype(np.float32)).all())


class AsGiven:
    """Preprocessing for images that are already normalised: changes the dtype only."""

    mean = (0.0,)

    def to_unit(self, images, dtype):
        return images.astype(dtype)

    def normalize(self, images):
        return images
