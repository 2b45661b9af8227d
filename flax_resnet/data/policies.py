"""Automatic augmentation inside the jitted step: AutoAugment, RandAugment and TrivialAugment.

All share one set of operations on the levels 0 to 255 of an image, in Pillow's arithmetic: the
references of torchvision and timm apply them to Pillow's images. A policy only draws: `draw_*`
turns one key per example (`keys` [B]) into operations [B, n] int32, which are indices into
`OPERATIONS`, and their arguments [B, n] float32. `transform` applies them, so that the draws of
torchvision and timm can be replayed.

The argument of an operation is: the factor of a shear or an enhancement; pixels of a translation;
degrees counter-clockwise of a rotation; bits that Posterize keeps; the first level that Solarize
inverts; the levels that SolarizeAdd adds. The others ignore it.
`equivalence_tests/numerics/test_policies.py` compares each of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resnet.config.policies import RandPolicy

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_LEVELS = (
    "Brightness", "Contrast", "Posterize", "Solarize", "SolarizeAdd", "AutoContrast", "Equalize",
    "Invert",
)  # fmt: skip
_ENHANCED = ("Brightness", "Color", "Contrast", "Sharpness")
OPERATIONS = ("Identity", *_GEOMETRIC, *_LEVELS, "Color", "Sharpness")
"""Names of the operations."""

_FAMILY = [0] + [1] * len(_GEOMETRIC) + [2] * len(_LEVELS) + [3, 4]
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's filter of this name


def transform(
    images: jax.Array,
    operations: jax.Array,
    arguments: jax.Array,
    *,
    interpolation: str = "nearest",
    fill: tuple[int, ...] | int = 0,
) -> jax.Array:
    """Apply each image's operations, one after the other.

    Args:
      images: [B, H, W, C], levels as int32; images of one channel keep Color.
      operations: [B, n] int32.
      arguments: [B, n] float32.
      interpolation: filter of the geometric operations; static.
      fill: level, or one a channel, of what comes from outside the image; static.
    """
    one = functools.partial(_transform_one, interpolation=interpolation, fill=fill)

    def step(images, draws):
        return jax.vmap(one)(images, *draws), None

    return lax.scan(step, images, (operations.T, arguments.T))[0]


def _transform_one(image, operation, argument, *, interpolation, fill):
    """Mapped over a batch, the switch computes its five branches for every image."""
    warp = functools.partial(_warp, interpolation=interpolation, fill=fill)
    branches = [lambda image, *_: image, warp, _map_levels, _color, _sharpen]
    family = jnp.array(_FAMILY, jnp.int32)[operation]
    return lax.switch(family, branches, image, operation, argument)


def _warp(image, operation, argument, *, interpolation, fill):
    """Take each pixel from where the matrix of the operation says, around the image's centre."""
    height, width, _ = image.shape
    y = (jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2)[None, :]
    a, b, c, d, e, f = _matrix(operation, argument, height, width)
    source_x = a * x + b * y + c + (width - 1) / 2
    source_y = d * x + e * y + f + (height - 1) / 2
    from_x, from_y = a * x + b * y + c + width / 2, d * x + e * y + f + height / 2
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    sampled = _sample(image, source_y, source_x, interpolation)
    return jnp.where(inside[..., None], sampled, jnp.array(fill, jnp.int32))


def _matrix(operation, argument, height, width):
    """Coordinates from the centre of the result -> those of the source. Shears leave the upper left
    corner in place."""
    zero, one = jnp.zeros_like(argument), jnp.ones_like(argument)
    cos, sin = jnp.cos(jnp.deg2rad(argument)), jnp.sin(jnp.deg2rad(argument))
    rows = [
        [one, argument, argument * height / 2, zero, one, zero],
        [one, zero, zero, argument, one, argument * width / 2],
        [one, zero, -argument, zero, one, zero],
        [one, zero, zero, zero, one, -argument],
        [cos, -sin, zero, sin, cos, zero],
    ]
    return jnp.array(rows)[operation - OPERATIONS.index(_GEOMETRIC[0])]


def _sample(image, y, x, interpolation):
    """The image at coordinates [H, W] of pixel centres, its border repeated; Pillow truncates."""
    if interpolation == "nearest":
        return _pixel(image, jnp.floor(y + 0.5), jnp.floor(x + 0.5))
    top, left = jnp.floor(y), jnp.floor(x)
    rows, columns = (_TAPS[interpolation](z) for z in (y - top, x - left))
    total = 0.0
    for down, row_weight in rows:
        line = sum(w[..., None] * _pixel(image, top + down, left + k) for k, w in columns)
        total += row_weight[..., None] * line
    # Float32 may fall just short of a whole number, which Pillow's doubles reach.
    return jnp.clip(total + 1e-4, 0, 255).astype(jnp.int32)


def _pixel(image, y, x):
    height, width, _ = image.shape
    return image[jnp.clip(y, 0, height - 1).astype(int), jnp.clip(x, 0, width - 1).astype(int)]


_TAPS = {
    "bilinear": lambda d: [(0, 1 - d), (1, d)],
    # Pillow's transforms use Keys' cubic with a = -1, its resizing one with a = -0.5.
    "bicubic": lambda d: [
        (-1, -d + 2 * d**2 - d**3),
        (0, 1 - 2 * d**2 + d**3),
        (1, d + d**2 - d**3),
        (2, d**3 - d**2),
    ],
}
"""{filter: distance from the pixel before -> (pixels from there, weight) of each tap}"""


def _map_levels(image, operation, argument):
    """Operations on each level of each channel, by a table of 256."""
    levels = jnp.arange(256)
    channels = [image[..., k] for k in range(image.shape[-1])]
    mean = jnp.floor(_gray(image).mean(dtype=jnp.float32) + 0.5)
    bits = jnp.maximum(8 - argument.astype(jnp.int32), 0)  # 8 bits and more change nothing
    common = [
        _blend(levels, 0.0, argument),
        _blend(levels, mean, argument),
        levels >> bits << bits,
        jnp.where(levels < argument, levels, 255 - levels),
        jnp.where(levels < 128, jnp.minimum(levels + argument.astype(jnp.int32), 255), levels),
    ]

    def mapped(channel):
        own = [_auto_contrast(channel), _equalize(channel), 255 - levels]
        table = jnp.stack([*common, *own])[operation - OPERATIONS.index(_LEVELS[0])]
        return table[channel]

    return jnp.stack([mapped(channel) for channel in channels], -1)


def _auto_contrast(channel):
    """The table that spreads the channel's levels over 0 to 255."""
    low, high = channel.min(), channel.max()
    scale = 255 / jnp.maximum(high - low, 1).astype(jnp.float32)
    spread = (jnp.arange(256) - low) * scale
    table = jnp.clip(spread + 1e-4, 0, 255).astype(jnp.int32)  # 1e-4: as in `_sample`
    return jnp.where(high > low, table, jnp.arange(256))


def _equalize(channel):
    """The table that makes all levels of the channel about equally frequent."""
    counts = jnp.zeros(256, jnp.int32).at[channel.ravel()].add(1)
    step = (channel.size - counts[channel.max()]) // 255
    before = jnp.cumsum(counts) - counts
    table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table, jnp.arange(256))


def _color(image, operation, argument):
    if image.shape[-1] == 1:
        return image
    return _blend(image, _gray(image), argument)


def _sharpen(image, operation, argument):
    """Blend with the smoothed image; the border is left alone, and so are images without inside."""
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    inside = image[1:-1, 1:-1]
    smooth = sum(
        _SMOOTH[y, x] * image[y : height - 2 + y, x : width - 2 + x].astype(jnp.float32)
        for y in range(3)
        for x in range(3)
    )
    smooth = jnp.floor(smooth + 0.5 + 1e-4)  # 1e-4: as in `_sample`
    return image.at[1:-1, 1:-1].set(_blend(inside, smooth, argument))


def _gray(image):
    """Pillow's luminance of the image, [H, W, 1] int32."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = (image[..., k : k + 1] for k in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(image, partner, factor):
    mixed = partner + factor * (image.astype(jnp.float32) - partner)
    return jnp.clip(mixed, 0, 255).astype(jnp.int32)


# --- draws ---

Draws = tuple[jax.Array, jax.Array]


def draw_trivial(uniform: jax.Array) -> Draws:
    """torchvision's TrivialAugmentWide: one operation of 14 at one of 31 magnitudes.

    Args:
      uniform: [B, 3], in [0, 1).
    """
    names = [n for n in OPERATIONS if n not in ("SolarizeAdd", "Invert")]
    arguments = _arguments(names, _bins(31, 0.99, 32, 32, 135, 6))
    return _pick(names, arguments, *uniform[:, None].transpose(2, 0, 1))


def draw_rand(uniform: jax.Array, height: int, width: int, magnitude: int) -> Draws:
    """torchvision's RandAugment: operations of 14 at the same magnitude of 31.

    Args:
      uniform: [B, 2 n] for n operations.
    """
    names = [n for n in OPERATIONS if n not in ("SolarizeAdd", "Invert")]
    arguments = _arguments(names, _paper_bins(31, height, width))[:, :, magnitude, None]
    choice, sign = jnp.split(uniform, 2, axis=1)
    return _pick(names, arguments, choice, jnp.zeros_like(choice), sign)


def _bins(count, strength, across, down, degrees, bits, shear=None):
    """{operation: its magnitudes}; signed ones are drawn with either sign."""
    rise = functools.partial(_linspace, 0, count=count)
    shear = strength if shear is None else shear
    return {
        "ShearX": rise(shear),
        "ShearY": rise(shear),
        "TranslateX": rise(across),
        "TranslateY": rise(down),
        "Rotate": rise(degrees),
        "Posterize": np.round(8 - bits * np.linspace(0, 1, count)),
        "Solarize": np.ceil(255 * _linspace(1, 0, count)),
    } | {name: rise(strength) for name in _ENHANCED}


def _linspace(start, end, count) -> np.ndarray:
    """torch.linspace of float32. Its rounding decides where Solarize and translations, which come
    to whole numbers, step."""
    start, end, index = np.float32(start), np.float32(end), np.arange(count)
    step = np.float64((end - start) / np.float32(count - 1))
    values = np.where(index < count // 2, start + index * step, end - (count - 1 - index) * step)
    return values.astype(np.float32).astype(np.float64)


def _paper_bins(count, height, width):
    """The magnitudes of AutoAugment's paper, at the image's size."""
    return _bins(count, 0.9, 150 / 331 * width, 150 / 331 * height, 30, 4, shear=0.3)


def _arguments(names, bins) -> np.ndarray:
    """Arguments with a positive and a negative sign, [2, operations, magnitudes] float32."""
    nothing = np.zeros_like(bins["Rotate"])

    def signed(name, sign):
        values = bins.get(name, nothing)
        if name in _ENHANCED:
            return 1 + sign * values
        if name.startswith("Translate"):
            return np.trunc(sign * values)
        return sign * values if name in _GEOMETRIC else values

    return np.array([[signed(name, sign) for name in names] for sign in (1, -1)], np.float32)


def _pick(names, arguments, choice, strength, sign) -> Draws:
    """Uniform numbers [B, n] -> operations and arguments."""
    choice = (choice * len(names)).astype(jnp.int32)
    strength = (strength * arguments.shape[2]).astype(jnp.int32)
    indices = jnp.array([OPERATIONS.index(name) for name in names], jnp.int32)
    negative = (sign <= 0.5).astype(jnp.int32)
    return indices[choice], jnp.array(arguments)[negative, choice, strength]


def draw_auto(uniform: jax.Array, height: int, width: int, policy: str) -> Draws:
    """torchvision's AutoAugment: one of 25 pairs of operations, each with its probability.

    Args:
      uniform: [B, 5].
      policy: "imagenet" or "cifar10"; static.
    """
    names = OPERATIONS
    arguments = _arguments(names, _paper_bins(10, height, width))
    pairs = [[step.split() for step in pair.split(", ")] for pair in AUTO_POLICIES[policy]]
    steps = [[(names.index(n), float(p), int(m)) for n, p, m in pair] for pair in pairs]
    operations, probabilities, magnitudes = jnp.moveaxis(jnp.array(steps), -1, 0)
    row = (uniform[:, 0] * len(pairs)).astype(jnp.int32)
    applied = uniform[:, 1:3] <= probabilities[row]
    chosen = jnp.where(applied, operations[row].astype(jnp.int32), 0)
    negative = (uniform[:, 3:5] <= 0.5).astype(jnp.int32)
    return chosen, jnp.array(arguments)[negative, chosen, magnitudes[row].astype(jnp.int32)]


def draw_timm(uniform: jax.Array, height: int, width: int, policy: RandPolicy) -> Draws:
    """timm's RandAugment: operations of 15, each at a level of its own, each applied or not.

    Args:
      uniform: [B, 4 n] for n operations.
    """
    choice, applied, level, sign = jnp.split(uniform, 4, axis=1)
    noise = level * policy.m if policy.mstd > 100 else policy.m
    if 0 < policy.mstd <= 100:
        noise = policy.m + policy.mstd * jax.scipy.special.ndtri(level)
    share = jnp.clip(noise, 0, policy.mmax) / 10 * jnp.ones_like(sign)
    table = timm_arguments(share, jnp.where(sign > 0.5, -1, 1), height, width, bool(policy.inc))
    choice = (choice * len(table)).astype(jnp.int32)
    indices = jnp.array([OPERATIONS.index(name) for name in table], jnp.int32)
    arguments = jnp.stack(list(table.values()), -1)  # [B, n, 15]
    arguments = jnp.take_along_axis(arguments, choice[..., None], axis=-1)[..., 0]
    return jnp.where(applied <= policy.p, indices[choice], 0), arguments


def timm_arguments(share, sign, height: int, width: int, increasing: bool) -> dict:
    """{operation: its argument} at a share of timm's highest level, 10; sign is 1 or -1."""
    bits, threshold = jnp.trunc(4 * share), jnp.minimum(jnp.trunc(256 * share), 256)
    added = jnp.minimum(jnp.trunc(110 * share), 128)
    factor = 1.8 * share + 0.1
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        factor = jnp.maximum(0.1, 1 + 0.9 * share * sign)
    nothing = jnp.zeros_like(share)
    return {
        "AutoContrast": nothing,
        "Equalize": nothing,
        "Invert": nothing,
        "Rotate": 30 * share * sign,
        "Posterize": bits,
        "Solarize": threshold,
        "SolarizeAdd": added,
        **dict.fromkeys(_ENHANCED, factor),
        "ShearX": 0.3 * share * sign,
        "ShearY": 0.3 * share * sign,
        # timm's translations are where a pixel comes from, torchvision's where it goes.
        "TranslateX": -0.45 * share * sign * width,
        "TranslateY": -0.45 * share * sign * height,
    }


AUTO_POLICIES = {
    "imagenet": (
        "Posterize 0.4 8, Rotate 0.6 9", "Solarize 0.6 5, AutoContrast 0.6 0",
        "Equalize 0.8 0, Equalize 0.6 0", "Posterize 0.6 7, Posterize 0.6 6",
        "Equalize 0.4 0, Solarize 0.2 4", "Equalize 0.4 0, Rotate 0.8 8",
        "Solarize 0.6 3, Equalize 0.6 0", "Posterize 0.8 5, Equalize 1.0 0",
        "Rotate 0.2 3, Solarize 0.6 8", "Equalize 0.6 0, Posterize 0.4 6",
        "Rotate 0.8 8, Color 0.4 0", "Rotate 0.4 9, Equalize 0.6 0",
        "Equalize 0.0 0, Equalize 0.8 0", "Invert 0.6 0, Equalize 1.0 0",
        "Color 0.6 4, Contrast 1.0 8", "Rotate 0.8 8, Color 1.0 2",
        "Color 0.8 8, Solarize 0.8 7", "Sharpness 0.4 7, Invert 0.6 0",
        "ShearX 0.6 5, Equalize 1.0 0", "Color 0.4 0, Equalize 0.6 0",
        "Equalize 0.4 0, Solarize 0.2 4", "Solarize 0.6 5, AutoContrast 0.6 0",
        "Invert 0.6 0, Equalize 1.0 0", "Color 0.6 4, Contrast 1.0 8",
        "Equalize 0.8 0, Equalize 0.6 0",
    ),
    "cifar10": (
        "Invert 0.1 0, Contrast 0.2 6", "Rotate 0.7 2, TranslateX 0.3 9",
        "Sharpness 0.8 1, Sharpness 0.9 3", "ShearY 0.5 8, TranslateY 0.7 9",
        "AutoContrast 0.5 0, Equalize 0.9 0", "ShearY 0.2 7, Posterize 0.3 7",
        "Color 0.4 3, Brightness 0.6 7", "Sharpness 0.3 9, Brightness 0.7 9",
        "Equalize 0.6 0, Equalize 0.5 0", "Contrast 0.6 7, Sharpness 0.6 5",
        "Color 0.7 7, TranslateX 0.5 8", "Equalize 0.3 0, AutoContrast 0.4 0",
        "TranslateY 0.4 3, Sharpness 0.2 6", "Brightness 0.9 6, Color 0.2 8",
        "Solarize 0.5 2, Invert 0.0 0", "Equalize 0.2 0, AutoContrast 0.6 0",
        "Equalize 0.2 0, Equalize 0.6 0", "Color 0.9 9, Equalize 0.6 0",
        "AutoContrast 0.8 0, Solarize 0.2 8", "Brightness 0.1 3, Color 0.7 0",
        "Solarize 0.4 5, AutoContrast 0.9 0", "TranslateY 0.9 9, TranslateY 0.7 9",
        "AutoContrast 0.9 0, Solarize 0.8 3", "Equalize 0.8 0, Invert 0.1 0",
        "TranslateY 0.7 9, AutoContrast 0.9 0",
    ),
}  # fmt: skip
"""The pairs of AutoAugment (arXiv:1805.09501): operation, probability, magnitude of 0 to 9."""
