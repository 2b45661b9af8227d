"""Automatic augmentation equals torchvision's and timm's on images of Pillow, for equal draws.

Each operation starts from the library's own image, so that roundings do not add up. Both truncate:
where a result is a whole number, float32 may fall short of it and lose a level. In a rotation to
the nearest pixel, a coordinate between two pixels may take the other one.
"""

import functools
import random
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from equivalence_tests.parity import inputs
from flax_resnet.config import AugmentConfig
from flax_resnet.config.policies import RandPolicy, rand_policy
from flax_resnet.data import augment as A
from flax_resnet.data import policies as P

pytestmark = pytest.mark.quick

H, W = 17, 23
METHODS = ("nearest", "bilinear", "bicubic")
LEVELS, PIXELS = 0.03, 2e-3  # shares of values that are off by one level, and by more


def pictures(channels=3):
    """Noise, smooth and flat images, and one with few levels; uint8 [6, H, W, C]."""
    rng = inputs.random_numbers()
    images = rng.integers(0, 256, (6, H, W, channels)).astype(np.uint8)
    steps = rng.normal(0, 6, (2, H, W, channels)).cumsum(1).cumsum(2)
    images[1:3] = np.clip(120 + steps, 0, 255)
    images[3] = images[3] // 3 + 60
    images[4, ..., -1] = 77
    images[5] = images[5] // 128 * 90
    return images


def to_pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def argument(name, magnitude):
    """Our argument of an operation of torchvision at its magnitude."""
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return 1 + magnitude
    if name == "Solarize":
        return np.ceil(255 * magnitude)
    return int(magnitude) if name.startswith("Translate") else magnitude


def recorded(policy, images):
    """Steps (image, operation, argument, result) of torchvision's policy on some images."""
    steps, apply = [], policy._apply_image_or_video_transform

    def note(image, name, magnitude, **options):
        result = apply(image, name, magnitude, **options)
        steps.append((image, P.OPERATIONS.index(name), argument(name, magnitude), result))
        return result

    with mock.patch.object(policy, "_apply_image_or_video_transform", note):
        for image in images:
            policy(to_pillow(image))
    return steps


transform = jax.jit(P.transform, static_argnames=("interpolation", "fill"))


def check(steps, **options):
    """Replays steps that a library has recorded; returns the names of their operations."""
    before, operations, arguments, after = map(np.stack, zip(*steps, strict=True))
    shape = (len(steps), H, W, -1)
    before = jnp.array(before.reshape(shape), jnp.int32)
    column = jnp.array(operations[:, None], jnp.int32), jnp.array(arguments[:, None], jnp.float32)
    actual = np.asarray(transform(before, *column, **options))
    difference = np.abs(actual - after.reshape(shape).astype(int))
    assert (difference == 1).mean() <= LEVELS and (difference > 1).mean() <= PIXELS
    return {P.OPERATIONS[k] for k in operations}


TORCHVISIONS = {
    "ta_wide": v2.TrivialAugmentWide,
    "ra": v2.RandAugment,
    "imagenet": lambda **options: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, **options),
    "cifar10": lambda **options: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, **options),
}


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_torchvisions(method):
    """Every operation at its weakest, a middle and its strongest magnitude, of either sign."""
    policy = v2.TrivialAugmentWide(interpolation=method)
    space = policy._AUGMENTATION_SPACE | {"Invert": (lambda *_: None, False)}
    options = {"interpolation": v2.InterpolationMode(method), "fill": policy._fill}
    steps = []
    for name, (magnitudes, signed) in space.items():
        values = magnitudes(31, H, W)
        values = [0.0] if values is None else [float(values[k]) for k in (0, 1, 7, 17, 30)]
        for magnitude in [sign * v for v in values for sign in ((1, -1) if signed else (1,))]:
            for image in map(to_pillow, pictures()):
                result = policy._apply_image_or_video_transform(image, name, magnitude, **options)
                step = P.OPERATIONS.index(name), argument(name, magnitude)
                steps.append((image, *step, result))
    assert check(steps, interpolation=method) == {*P.OPERATIONS} - {"SolarizeAdd"}


@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_torchvisions_with_its_draws(channels):
    torch.manual_seed(inputs.SEED)
    images = np.concatenate([pictures(channels)] * 10)
    policies = [make(interpolation="bilinear") for make in TORCHVISIONS.values()]
    steps = sum((recorded(policy, images) for policy in policies), [])
    assert check(steps, interpolation="bilinear") == {*P.OPERATIONS} - {"SolarizeAdd"}


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_policies_are_timms_with_its_draws(method, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    random.seed(inputs.SEED)
    np.random.seed(inputs.SEED)
    fill, steps = (124, 116, 104), []
    for name in ("rand-m7-mstd0.5-inc1", "rand-m9-n3-p0.7"):
        options = {"img_mean": fill, "interpolation": Image.Resampling[method.upper()]}
        policy = timm.rand_augment_transform(name, options)
        for op in policy.ops:
            monkeypatch.setattr(op, "aug_fn", noted(op, steps))
        for image in np.concatenate([pictures()] * 10):
            policy(to_pillow(image))
    assert check(steps, interpolation=method, fill=fill) == {*P.OPERATIONS} - {"Identity"}


def noted(op, steps):
    """The function of an operation of timm that notes what it does."""
    name, function = op.name.removesuffix("Increasing").removesuffix("Rel"), op.aug_fn

    def apply(image, *values, **options):
        result = function(image, *values, **options)
        size = {"TranslateX": -W, "TranslateY": -H}.get(name, 1)
        value = values[0] * size if values else 0.0
        steps.append((image, P.OPERATIONS.index(name), value, result))
        return result

    return apply


@pytest.mark.parametrize("shift", [-4.5, 4.5])
def test_half_pixels_at_the_border_are_pillows(shift):
    """timm does not round a translation."""
    image, fill, steps = to_pillow(pictures()[0]), (124, 116, 104), []
    for name, place in (("TranslateX", 2), ("TranslateY", 5)):
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[place] = -shift
        moved = image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
        )
        steps.append((image, P.OPERATIONS.index(name), shift, moved))
    check(steps, interpolation="bilinear", fill=fill)


def test_all_bits_and_more_change_nothing():
    image = to_pillow(pictures()[0])
    steps = [(image, P.OPERATIONS.index("Posterize"), bits, image) for bits in (8, 9, 16)]
    check(steps, interpolation="bilinear")


def test_operations_follow_one_another():
    images, names = jnp.array(pictures(), jnp.int32), ["Rotate", "Solarize", "Color"]
    operations = jnp.array([[P.OPERATIONS.index(name) for name in names]] * 6)
    arguments = jnp.array([[30.0, 100.0, 0.2]] * 6)
    once = images
    for k in range(3):
        once = transform(once, operations[:, k : k + 1], arguments[:, k : k + 1])
    together = transform(images, operations, arguments)
    assert (together != once).mean() < LEVELS  # fused differently
    assert (transform(images, operations[:, ::-1], arguments[:, ::-1]) != once).mean() > 0.3


# --- our own draws ---

MANY = 20_000


def draw(policy, size=(H, W), **options):
    keys = jax.random.split(jax.random.key(0), MANY)
    config = AugmentConfig(auto_augment=policy, **options)
    return map(np.asarray, jax.jit(lambda k: A.draw_policy(k, config, *size))(keys))


def theirs(space, bins, size):
    """{(operation, argument)} that torchvision can draw from a space."""
    found = set()
    for name, (magnitudes, signed) in space.items():
        values = magnitudes(bins, *size)
        for value in [0.0] if values is None else map(float, values):
            for sign in (1, -1) if signed else (1,):
                found.add((name, np.float32(argument(name, sign * value))))
    return found


def close(ours, other):
    """True if two sets of (operation, argument) are the same but for rounding."""
    for name in P.OPERATIONS:
        mine, theirs = (sorted({v for n, v in pairs if n == name}) for pairs in (ours, other))
        grid = np.abs(np.subtract.outer(mine, theirs)) <= 1e-4
        if not (grid.any(0).all() and grid.any(1).all()):
            return False
    return True


def test_trivial_draws_every_operation_and_magnitude_of_torchvision():
    operations, arguments = draw("ta_wide")
    names = [P.OPERATIONS[k] for k in operations[:, 0]]
    ignoring = ("Identity", "AutoContrast", "Equalize")
    ours = {
        (n, np.float32(0 if n in ignoring else a))
        for n, a in zip(names, arguments[:, 0], strict=True)
    }
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert close(ours, theirs(space, 31, (H, W)))
    counts = np.unique(names, return_counts=True)[1]
    assert len(counts) == 14 and np.abs(counts / MANY - 1 / 14).max() < 0.01
    turned = arguments[np.array(names) == "Rotate"]
    assert abs((turned < 0).mean() - 0.5 * 30 / 31) < 0.06  # 0 has no sign


@pytest.mark.parametrize("size", [(H, W), (224, 224)])
def test_rand_augment_draws_torchvisions_arguments(size):
    operations, arguments = draw("ra", size, ra_magnitude=11)
    space = v2.RandAugment._AUGMENTATION_SPACE
    other = {name: (lambda n, *s, f=f: None if f(n, *s) is None else f(n, *s)[11:12], signed)
             for name, (f, signed) in space.items()}  # fmt: skip
    ours = set(zip([P.OPERATIONS[k] for k in operations.ravel()], arguments.ravel(), strict=True))
    assert close(ours, theirs(other, 31, size))
    joint = np.unique(operations, axis=0, return_counts=True)[1]
    assert len(joint) == 14 * 14 and joint.max() < 2 * MANY / 14**2


@pytest.mark.parametrize("name", ["imagenet", "cifar10"])
def test_auto_augment_is_torchvisions_table(name):
    policy = v2.AutoAugment(v2.AutoAugmentPolicy(name))
    table = [
        tuple((n, float(p), int(m)) for n, p, m in (step.split() for step in pair.split(", ")))
        for pair in P.AUTO_POLICIES[name]
    ]
    assert table == [tuple((n, p, m or 0) for n, p, m in pair) for pair in policy._policies]
    operations, arguments = draw(name)
    assert (operations[:, 0] == P.OPERATIONS.index("Rotate")).mean() == pytest.approx(
        np.mean([a[1] * (a[0] == "Rotate") for a, _ in table]), abs=0.01
    )
    possible = theirs(v2.AutoAugment._AUGMENTATION_SPACE, 10, (H, W))
    ours = {
        (P.OPERATIONS[k], a) for k, a in zip(operations.ravel(), arguments.ravel(), strict=True)
    }
    for n, a in ours - {("Identity", a) for _, a in ours}:
        assert any(n == m and abs(a - b) <= 1e-4 for m, b in possible)


@pytest.mark.parametrize("increasing", [False, True])
def test_arguments_are_timms(increasing):
    timm = pytest.importorskip("timm.data.auto_augment")
    names = timm.rand_augment_choices("", increasing=increasing)
    bare = [name.removesuffix("Increasing").removesuffix("Rel") for name in names]
    for level in (0.0, 3.3, 7.0, 10.0):
        for sign in (1, -1):
            ours = P.timm_arguments(jnp.float32(level / 10), jnp.float32(sign), H, W, increasing)
            assert set(ours) == set(bare)
            for name, full in zip(bare, names, strict=True):
                if function := timm.LEVEL_TO_ARG[full]:
                    random.seed(next(s for s in range(9) if _negates(s) == (sign < 0)))
                    size = {"TranslateX": -W, "TranslateY": -H}.get(name, 1)
                    expected = function(level, {})[0] * size
                    assert float(ours[name]) == pytest.approx(expected, rel=1e-5), full


def _negates(seed):
    return random.Random(seed).random() > 0.5


def test_timm_levels_follow_the_notation():
    policy = rand_policy("rand-m7-mstd0.5-inc1")
    assert policy == RandPolicy(m=7, mstd=0.5, inc=1)
    operations, arguments = draw("rand-m7-mstd0.5-inc1")
    assert (operations == 0).mean() == pytest.approx(0.5, abs=0.01)
    degrees = np.abs(arguments[operations == P.OPERATIONS.index("Rotate")]) / 3
    assert degrees.mean() == pytest.approx(7, abs=0.06)
    assert degrees.std() == pytest.approx(0.5, abs=0.05)
    operations, arguments = draw("rand-m6-mstd101-n1-p1")
    degrees = np.abs(arguments[operations == P.OPERATIONS.index("Rotate")]) / 3
    assert operations.shape == (MANY, 1) and 0 not in operations
    assert degrees.mean() == pytest.approx(3, abs=0.2) and degrees.max() <= 6


@pytest.mark.parametrize(
    "word", ["rand-m7-x3", "rand-mm", "rand-n0", "rand-n2.5", "wide", "rand-t3a"]
)
def test_a_wrong_notation_is_named(word):
    with pytest.raises(ValueError, match=word.split("-")[-1]):
        AugmentConfig(auto_augment=word)


def test_augmentation_applies_the_policy_to_levels():
    """Levels of 8 bits come out, after the flip, filled with the mean for timm's policy."""
    images = jnp.array(pictures(), jnp.float32) / 255
    keys = jax.random.split(jax.random.key(3), len(images))
    config = AugmentConfig(random_crop=0, horizontal_flip=1.0, auto_augment="rand-p1-m10-n1")
    options = {"interpolation": "nearest", "mean": (0.5, 0.4, 0.2)}
    actual = jax.jit(functools.partial(A.augment, config=config, **options))(keys, images) * 255
    draws = A.draw_policy(keys, config, H, W)
    mirrored = jnp.array(pictures()[:, :, ::-1], jnp.int32)
    expected = transform(mirrored, *draws, interpolation="nearest", fill=(128, 102, 51))
    assert (np.abs(actual - expected) > 1e-3).mean() <= LEVELS
