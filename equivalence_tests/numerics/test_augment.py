"""Augmentation equals torchvision's for equal draws; our own draws have the right distribution."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from scipy import stats
from torchvision.transforms import v2

from equivalence_tests.parity import inputs
from flax_resnet.config import AugmentConfig, TrainConfig
from flax_resnet.data import augment as A
from flax_resnet.training import steps
from flax_resnet.training.network import Preprocess, Variables

pytestmark = pytest.mark.quick

LEVEL = 1 / 255
FLOAT = 1e-5  # float32 in [0, 1], a chain of four adjustments
BILINEAR = F.InterpolationMode.BILINEAR
B, H, W = 24, 13, 18  # no two alike

CONFIGS = {
    "crop": {"random_crop": 3},
    "flip": {"horizontal_flip": 0.5},
    "vertical flip": {"vertical_flip": 0.5},
    "rotation": {"rotation": 30.0},
    "jitter": {"brightness": 0.4, "contrast": 0.3, "saturation": 0.5, "hue": 0.2},
}


@pytest.fixture(autouse=True)
def seeds():
    torch.manual_seed(inputs.SEED)
    with jax.numpy_dtype_promotion("strict"):
        yield


def pixels(channels=3, size=(B, H, W), seed=0):
    """uint8 [B, H, W, C] that include the edge cases of HSV: black, white, gray, equal channels."""
    images = inputs.random_numbers(seed).integers(0, 256, (*size, channels), np.uint8)
    images[0], images[1], images[2] = 0, 255, 77
    images[3, ..., -1] = images[3, ..., 0]
    images[4] = images[4] // 32 * 255
    return images


def to_jax(images):
    return jnp.asarray(images, jnp.float32) / 255


def to_torch(images):
    """float [B, C, H, W], always a copy."""
    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2).contiguous()


def from_torch(images):
    return np.stack([image.numpy() for image in images]).transpose(0, 2, 3, 1)


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


# --- torchvision's draws, replayed ---


def test_crop_bit_exact():
    images = to_torch(pixels())
    pad = v2.Pad(3)
    draws = [T.RandomCrop.get_params(pad(image), (H, W)) for image in images]
    expected = [F.crop(pad(image), *draw) for image, draw in zip(images, draws, strict=True)]
    offsets = jnp.array([draw[:2] for draw in draws])
    assert len({tuple(map(int, offset)) for offset in offsets}) > 10
    actual = jax.jit(A.crop, static_argnums=2)(to_jax(pixels()), offsets, 3)
    np.testing.assert_array_equal(np.asarray(actual * 255).round(), from_torch(expected))


def test_flip_bit_exact():
    mirrored = torch.rand(B) < 0.5
    expected = [
        F.hflip(image) if m else image
        for image, m in zip(to_torch(pixels()), mirrored, strict=True)
    ]
    actual = A.flip(to_jax(pixels()), jnp.array(mirrored.numpy()))
    np.testing.assert_array_equal(np.asarray(actual * 255).round(), from_torch(expected))


def test_vertical_flip_bit_exact():
    mirrored = torch.rand(B) < 0.5
    images = zip(to_torch(pixels()), mirrored, strict=True)
    expected = [F.vflip(image) if m else image for image, m in images]
    actual = A.flip_vertically(to_jax(pixels()), jnp.array(mirrored.numpy()))
    np.testing.assert_array_equal(np.asarray(actual * 255).round(), from_torch(expected))


@pytest.mark.parametrize("size", [(B, H, W), (B, 32, 32)])
def test_rotation_bilinear(size):
    images = to_jax(pixels(size=size))
    angles = [T.RandomRotation.get_params([-180, 180]) for _ in images]
    expected = [
        v2.RandomRotation((angle, angle), BILINEAR)(image)
        for image, angle in zip(to_torch(images), angles, strict=True)
    ]
    actual = jax.jit(A.rotate)(images, jnp.array(angles, jnp.float32))
    # Bilinear sampling is continuous: a coordinate that is off by 1e-6 moves a value by as much.
    np.testing.assert_allclose(actual, from_torch(expected), atol=5e-5)


def replay_jitter(image, order, factors):
    adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for number in order:
        image = adjust[number](image, float(factors[number]))
    return image


def jitter_draws(number):
    strengths = dict(brightness=[0.2, 1.8], contrast=[0.2, 1.8], saturation=[0, 2], hue=[-0.5, 0.5])
    draws = [T.ColorJitter.get_params(**strengths) for _ in range(number)]
    return torch.stack([draw[0] for draw in draws]).numpy(), np.array([draw[1:] for draw in draws])


ADJUSTMENTS = [A.BRIGHTNESS, A.CONTRAST, A.SATURATION, A.HUE]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", ADJUSTMENTS)
def test_color_jitter_one_adjustment(number, channels):
    images, factors = pixels(channels), jitter_draws(B)[1]
    order = np.full((B, 1), number)
    run = jax.jit(partial(A.color_jitter, active=(number,)))
    actual = np.asarray(run(to_jax(images), jnp.array(order), jnp.array(factors)))
    floats = [replay_jitter(*x) for x in zip(to_torch(to_jax(images)), order, factors, strict=True)]
    np.testing.assert_allclose(actual, from_torch(floats), atol=FLOAT)

    levels = [replay_jitter(*x) for x in zip(to_torch(images), order, factors, strict=True)]
    # On uint8 torchvision truncates the result, and the gray used by contrast and saturation.
    gray = np.abs(1 - factors[:, number]) if number in (A.CONTRAST, A.SATURATION) else np.zeros(B)
    error = np.abs(actual - from_torch(levels) / 255).max((1, 2, 3))
    assert (error <= (1.001 + gray) * LEVEL).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_color_jitter_chain(channels):
    images, (order, factors) = pixels(channels), jitter_draws(B)
    actual = jax.jit(A.color_jitter)(to_jax(images), jnp.array(order), jnp.array(factors))
    draws = zip(to_torch(to_jax(images)), order, factors, strict=True)
    expected = from_torch([replay_jitter(*draw) for draw in draws])
    np.testing.assert_allclose(actual, expected, atol=FLOAT)


def test_color_jitter_chain_on_uint8():
    """Every step starts from torchvision's uint8 image, so that truncations do not add up."""
    images, (order, factors) = pixels(), jitter_draws(B)
    factors[:, :3] = factors[:, :3] * 0.25 + 0.75  # to [0.8, 1.2]: a gray truncated weighs little
    run = jax.jit(A.color_jitter)
    for step in order.T[:, :, None]:
        actual = np.asarray(run(to_jax(images), jnp.array(step), jnp.array(factors)))
        draws = zip(to_torch(images), step, factors, strict=True)
        images = from_torch([replay_jitter(*draw) for draw in draws])
        assert np.abs(actual - images / 255).max() <= 1.26 * LEVEL


@pytest.mark.control
def test_color_jitter_order_matters():
    images, order = to_jax(pixels()), jnp.array([[0, 1, 2, 3]] * B)
    factors = jnp.array([[1.7, 0.4, 1.9, 0.3]] * B)
    forward = A.color_jitter(images, order, factors)
    backward = A.color_jitter(images, order[:, ::-1], factors)
    assert jnp.abs(forward - backward).max() > 0.1


def test_erasing_exact():
    images = torch.randn(B, 3, H, W)
    draws = [T.RandomErasing.get_params(i, (0.02, 0.33), (0.3, 3.3), [0.0]) for i in images]
    expected = [F.erase(image, *draw) for image, draw in zip(images, draws, strict=True)]
    rectangles = jnp.array([draw[:4] for draw in draws])
    actual = A.erase(jnp.array(from_torch(images)), rectangles)
    np.testing.assert_array_equal(actual, from_torch(expected))


def test_erasing_comes_after_normalising():
    """Erased pixels are 0, the mean colour, as after torchvision's Normalize; not black."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    batch = {"image": jnp.asarray(pixels()), "label": jnp.zeros(B, int), "index": jnp.arange(B)}
    config = TrainConfig(augment=AugmentConfig(random_crop=0, random_erasing=1.0))
    state = steps.make_state(Variables({"weight": jnp.ones(1)}, {}, {}), config)
    actual = steps.prepare_batch(state, batch, config, Preprocess(mean, std), num_classes=10).images
    whole = from_torch(F.normalize(to_torch(to_jax(pixels())), mean, std))
    erased = (np.abs(actual - whole) > FLOAT).any(-1)
    assert erased.any((1, 2)).all() and erased.mean() < 0.4
    assert (np.asarray(actual)[erased] == 0).all()


def test_mixup_exact(monkeypatch):
    # Multiples of 1/256 and 1/16: products and sums have no rounding in float32.
    images = torch.randint(0, 256, (B, 3, H, W)) / 256
    labels = torch.randint(0, 7, (B,))
    reference = v2.MixUp(alpha=0.3, num_classes=7)
    monkeypatch.setattr(reference._dist, "sample", lambda _: torch.tensor(11 / 16))
    mixed, targets = reference(images, labels)
    share = jnp.array(11 / 16)
    np.testing.assert_array_equal(A.mixup(jnp.array(from_torch(images)), share), from_torch(mixed))
    one_hot = jax.nn.one_hot(jnp.array(labels.numpy()), 7)
    np.testing.assert_array_equal(A.mixup(one_hot, share), targets.numpy())


def test_cutmix_bit_exact():
    torch.manual_seed(inputs.SEED)
    images, labels = torch.rand(B, 3, H, W), torch.randint(0, 7, (B,))
    reference, boxes = v2.CutMix(alpha=1.0, num_classes=7), []
    one_hot = jax.nn.one_hot(jnp.array(labels.numpy()), 7)
    run = jax.jit(lambda images, box: A.mixup(images, A.outside(box, H, W)))
    for _ in range(12):
        params = reference.make_params([images])
        x1, y1, x2, y2 = params["box"]
        boxes.append(jnp.array([y1, x1, y2, x2]))
        with mock.patch.object(reference, "make_params", lambda _, params=params: params):
            mixed, targets = reference(images, labels)
        got = run(jnp.array(from_torch(images)), boxes[-1])
        np.testing.assert_array_equal(got, from_torch(mixed))
        share = A.outside(boxes[-1], H, W).mean()
        np.testing.assert_allclose(A.mixup(one_hot, share), targets.numpy(), atol=1e-6)
    assert len({tuple(map(int, box)) for box in boxes}) == 12


# --- our own draws ---

MANY = 20_000


def uniform(values, low, high):
    return stats.kstest(np.asarray(values), stats.uniform(low, high - low).cdf).pvalue


def draw(function, number, *arguments, seed=0):
    run = jax.jit(function, static_argnums=tuple(range(1, 1 + len(arguments))))
    return jax.tree.map(np.asarray, run(keys(number, seed), *arguments))


def test_crop_offsets_are_uniform():
    offsets = draw(A.draw_crop, MANY, 2)
    assert offsets.min() == 0 and offsets.max() == 4
    joint = np.zeros((5, 5))
    np.add.at(joint, (offsets[:, 0], offsets[:, 1]), 1)
    assert stats.chisquare(joint.ravel()).pvalue > 1e-4


def test_flips_have_their_probability():
    assert abs(draw(A.draw_flip, MANY, 0.3).mean() - 0.3) < 5 * np.sqrt(0.21 / MANY)
    assert draw(A.draw_flip, 50, 1.0).all() and not draw(A.draw_flip, 50, 0.0).any()
    vertical = draw(A.draw_vertical_flip, MANY, 0.3)
    assert abs(vertical.mean() - 0.3) < 5 * np.sqrt(0.21 / MANY)


def test_rotation_angles_are_uniform():
    assert uniform(draw(A.draw_rotation, MANY, 25.0), -25, 25) > 1e-4


def test_jitter_factors_and_orders_are_uniform():
    order, factors = draw(A.draw_color_jitter, MANY, (0.4, 1.5, 0.2, 0.1))
    ranges = [(0.6, 1.4), (0, 2.5), (0.8, 1.2), (-0.1, 0.1)]
    for column, (low, high) in zip(factors.T, ranges, strict=True):
        assert uniform(column, low, high) > 1e-4
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4
    assert np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.04


def test_jitter_draws_only_adjustments_that_are_on():
    order, _ = draw(A.draw_color_jitter, 200, (0.4, 0, 0, 0.1))
    assert {tuple(row) for row in order.tolist()} == {(0, 3), (3, 0)}


def test_draw_erasing_is_torchvisions_distribution():
    number, size = 4000, (20, 33)
    ours = draw(A.draw_erasing, number, 1.0, *size)
    image = torch.zeros(1, *size)
    params = partial(T.RandomErasing.get_params, image, (0.02, 0.33), (0.3, 3.3), [0.0])
    theirs = np.array([params()[:4] for _ in range(number)])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4
    assert (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2]).max() <= 20 and (ours[:, 1] + ours[:, 3]).max() <= 33


def test_draw_erasing_probability_and_ten_tries():
    some, every = (draw(A.draw_erasing, MANY, p, 32, 32) for p in (0.4, 1.0))
    erased = some[:, 2] > 0
    assert abs(erased.mean() - 0.4) < 0.02
    for left, all_ in zip(some[erased].T, every.T, strict=True):  # the rest is unchanged
        assert stats.ks_2samp(left, all_).pvalue > 1e-4
    # In an image one pixel high, a smaller height rounds to 0, so no rectangle fits.
    assert not draw(A.draw_erasing, 100, 1.0, 1, 400)[:, 2].any()


def test_mixup_shares_follow_the_beta_distribution():
    shares = draw(jax.vmap(partial(A.draw_mixup, alpha=0.4)), 5000)
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-4


def test_draw_box_is_torchvisions_distribution():
    ours = draw(jax.vmap(partial(A.draw_box, alpha=0.6, height=H, width=W)), 4000)
    reference = v2.CutMix(alpha=0.6, num_classes=2)
    blank = torch.zeros(1, 3, H, W)
    theirs = np.array([reference.make_params([blank])["box"] for _ in range(4000)])
    for mine, other in zip(ours.T, theirs[:, [1, 0, 3, 2]].T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4


def test_a_batch_takes_mixup_or_cutmix_by_chance():
    both = AugmentConfig(mixup=0.4, cutmix=1.0)
    pixels, shares = draw(jax.vmap(partial(A.draw_mix, config=both, height=H, width=W)), 2000)
    cut = ((pixels == 0) | (pixels == 1)).all((1, 2, 3, 4))
    assert abs(cut.mean() - 0.5) < 0.06
    np.testing.assert_allclose(shares, pixels.mean((1, 2, 3, 4)), atol=1e-6)
    assert stats.kstest(shares[~cut], stats.beta(0.4, 0.4).cdf).pvalue > 1e-4
    alone = draw(
        jax.vmap(partial(A.draw_mix, config=AugmentConfig(mixup=0.4), height=H, width=W)), 9
    )
    np.testing.assert_array_equal(alone[0], draw(jax.vmap(partial(A.draw_mixup, alpha=0.4)), 9))


def test_draws_are_independent():
    """Draws of two transforms of one example, or of neighbouring examples, are uncorrelated."""
    columns = [
        *draw(A.draw_crop, MANY, 4).T,
        draw(A.draw_flip, MANY, 0.5),
        draw(A.draw_vertical_flip, MANY, 0.5),
        draw(A.draw_rotation, MANY, 10.0),
        *draw(A.draw_color_jitter, MANY, (0.1, 0.1, 0.1, 0.1))[1].T,
        *draw(A.draw_erasing, MANY, 1.0, 32, 32).T,
    ]
    columns = np.stack(columns).astype(float)
    related = np.abs(np.corrcoef(columns))
    related[-4:, -4:] = 0  # a large rectangle lies further up and left
    np.fill_diagonal(related, 0)
    assert related.max() < 0.04
    neighbours = [abs(np.corrcoef(column[:-1], column[1:])[0, 1]) for column in columns]
    assert max(neighbours) < 0.04


# --- the whole ---


@pytest.mark.parametrize("name", CONFIGS)
def test_augmentation_depends_on_the_example_not_on_the_batch(name):
    config, images = AugmentConfig(**CONFIGS[name]), to_jax(pixels())
    whole = augment(keys(B), images, config)
    halves = [augment(keys(B)[part], images[part], config) for part in (slice(0, 12), slice(12, B))]
    np.testing.assert_allclose(whole, np.concatenate(halves), atol=1e-6)
    np.testing.assert_array_equal(whole, augment(keys(B), images, config))
    other = augment(keys(B, seed=1), images, config)
    assert np.abs(np.asarray(whole - other)).max() > 0.1


augment = jax.jit(A.augment, static_argnums=2)


def test_transforms_are_applied_in_torchvisions_order():
    """Crop, flip, rotation, then contrast, which depends on pixels that the others remove."""
    geometry = CONFIGS["crop"] | CONFIGS["flip"] | CONFIGS["rotation"]
    images = to_jax(pixels())
    expected = A.crop(images, draw(A.draw_crop, B, 3), 3)
    expected = A.flip(expected, draw(A.draw_flip, B, 0.5))
    expected = A.rotate(expected, draw(A.draw_rotation, B, 30.0))
    order, factors = draw(A.draw_color_jitter, B, (0, 0.8, 0, 0))
    expected = A.color_jitter(expected, order, factors, active=(A.CONTRAST,))
    actual = augment(keys(B), images, AugmentConfig(**geometry, contrast=0.8))
    np.testing.assert_allclose(actual, expected, atol=FLOAT)


def test_augmentation_that_is_off_compiles_to_nothing():
    config = AugmentConfig(random_crop=0, random_erasing=0.5, mixup=0.5, random_resized_crop=True)
    program = jax.make_jaxpr(A.augment, static_argnums=2)(keys(2), to_jax(pixels())[:2], config)
    assert not program.eqns
    text = augment.lower(
        keys(2), to_jax(pixels())[:2], AugmentConfig(random_crop=0, brightness=0.2)
    )
    assert "floor" not in text.as_text(), "hue is in a program that changes brightness only"


@pytest.mark.parametrize("name", CONFIGS)
def test_float64(x64, name):
    config, images = AugmentConfig(**CONFIGS[name]), jnp.asarray(pixels() / 255)
    exact, single = (
        augment(keys(B), images.astype(dtype), config) for dtype in (jnp.float64, jnp.float32)
    )
    assert (exact.dtype, single.dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_allclose(exact, single, atol=1e-4)  # the same draws


def test_erasing_and_mixup_keep_float64(x64):
    images = jnp.asarray(pixels() / 255)
    erased = A.erase(images, draw(A.draw_erasing, B, 1.0, H, W))
    assert A.mixup(erased, draw(jax.vmap(partial(A.draw_mixup, alpha=1)), 1)[0]).dtype == "float64"
