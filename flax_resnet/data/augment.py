"""Training-time augmentation with torchvision's definitions, inside the jitted step.

Every transform is two pure functions. `draw_*` turns one key per example (`keys` [B], from
`jax.random.key`) into parameters. The other function applies given parameters to float images
[B, H, W, C], so that torchvision's own draws can be replayed. Draws are float32 whatever the type
of the images, and depend on the example's key alone, never on the rest of the batch.
`equivalence_tests/numerics/test_augment.py` compares each transform with torchvision.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnet.config import AugmentConfig
from flax_resnet.config.policies import rand_policy
from flax_resnet.data import policies

# The number of a transform is folded into the example's key, so that draws are independent.
_CROP, _FLIP, _ROTATION, _JITTER, _ERASING, _VERTICAL_FLIP, _POLICY = range(7)

_CHOICE, _BOX = range(2)  # as above, in the key of a batch

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's indices in ColorJitter

_ERASING_AREA = (0.02, 0.33)  # share of the image
_ERASING_RATIO = (0.3, 3.3)  # height / width
_ERASING_TRIES = 10


def augment(
    keys: jax.Array,
    images: jax.Array,
    config: AugmentConfig,
    *,
    interpolation: str = "bilinear",
    mean: tuple[float, ...] = (0.0,),
) -> jax.Array:
    """Apply the transforms that precede normalisation: crop, flips, the policy of `auto_augment`,
    rotation, colour jitter.

    Args:
      keys: [B], one per example.
      images: [B, H, W, C], float in [0, 1].
      config: static; a transform that is off leaves nothing in the program.
      interpolation: filter of the policy; static.
      mean: of each channel, in [0, 1], with which timm's policies fill; static.
    """
    if config.random_crop:
        images = crop(images, draw_crop(keys, config.random_crop), config.random_crop)
    if config.horizontal_flip:
        images = flip(images, draw_flip(keys, config.horizontal_flip))
    if config.vertical_flip:
        images = flip_vertically(images, draw_vertical_flip(keys, config.vertical_flip))
    if config.auto_augment:
        images = auto_augment(keys, images, config, interpolation, mean)
    if config.rotation:
        images = rotate(images, draw_rotation(keys, config.rotation))
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    if active := _active(strengths):
        order, factors = draw_color_jitter(keys, strengths)
        images = color_jitter(images, order, factors, active=active)
    return images


def draw_crop(keys: jax.Array, padding: int) -> jax.Array:
    """Draw offsets [B, 2] int32 (top, left), uniform in 0..2 * padding."""
    return (_draw(keys, _CROP, 2) * (2 * padding + 1)).astype(jnp.int32)


def crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
    """torchvision's RandomCrop(size, padding=padding): pad with zeros, cut back at `offsets`."""
    edge = (padding, padding)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)))

    def cut(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, jnp.zeros_like(offset[0])), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def draw_flip(keys: jax.Array, probability: float) -> jax.Array:
    """Draw whether to mirror each image, [B] bool."""
    return _draw(keys, _FLIP, 1)[:, 0] < probability


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Mirror the images where `mirrored` [B] is true."""
    return jnp.where(_per_image(mirrored), images[:, :, ::-1], images)


def draw_vertical_flip(keys: jax.Array, probability: float) -> jax.Array:
    """Draw whether to turn each image upside down, [B] bool."""
    return _draw(keys, _VERTICAL_FLIP, 1)[:, 0] < probability


def flip_vertically(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Turn the images upside down where `mirrored` [B] is true."""
    return jnp.where(_per_image(mirrored), images[:, ::-1], images)


def auto_augment(
    keys: jax.Array,
    images: jax.Array,
    config: AugmentConfig,
    interpolation: str,
    mean: tuple[float, ...],
) -> jax.Array:
    """Apply the policy of `auto_augment` to the images, which come from levels of 8 bits."""
    draws = draw_policy(keys, config, *images.shape[1:3])
    fill = 0
    if config.auto_augment.startswith("rand"):  # timm's
        fill = tuple(min(255, round(255 * value)) for value in mean)
    levels = jnp.round(images * 255).astype(jnp.int32)
    levels = policies.transform(levels, *draws, interpolation=interpolation, fill=fill)
    return levels.astype(images.dtype) / 255


def draw_policy(
    keys: jax.Array, config: AugmentConfig, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Draw operations [B, n] int32 and their arguments [B, n] for `policies.transform`."""
    draw, name = functools.partial(_draw, keys, _POLICY), config.auto_augment
    if name == "ta_wide":
        return policies.draw_trivial(draw(3))
    if name == "ra":
        return policies.draw_rand(draw(4), height, width, config.ra_magnitude)
    if name in policies.AUTO_POLICIES:
        return policies.draw_auto(draw(5), height, width, name)
    rand = rand_policy(name)
    return policies.draw_timm(draw(4 * rand.n), height, width, rand)


def draw_rotation(keys: jax.Array, degrees: float) -> jax.Array:
    """Draw angles [B] in degrees, uniform in [-degrees, degrees]."""
    return degrees * (2 * _draw(keys, _ROTATION, 1)[:, 0] - 1)


def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
    """torchvision's bilinear RandomRotation by `angles` [B] in degrees, counter-clockwise, with
    black outside and the size kept."""
    return jax.vmap(_rotate_one)(images, jnp.deg2rad(angles.astype(images.dtype)))


def _rotate_one(image: jax.Array, angle: jax.Array) -> jax.Array:
    height, width, _ = image.shape
    # Distances from the centre of the image, which is between two pixels if the size is even.
    y = (jnp.arange(height, dtype=image.dtype) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width, dtype=image.dtype) - (width - 1) / 2)[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    source_y = sin * x + cos * y + (height - 1) / 2
    source_x = cos * x - sin * y + (width - 1) / 2

    # torchvision blends fill=0 a second time at the border, by the share of a pixel that is inside.
    image = jnp.concatenate([image, jnp.ones_like(image[..., :1])], -1)
    top, left = jnp.floor(source_y), jnp.floor(source_x)
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]
    upper = (1 - right) * _pixels(image, top, left) + right * _pixels(image, top, left + 1)
    lower = (1 - right) * _pixels(image, top + 1, left) + right * _pixels(image, top + 1, left + 1)
    sampled = (1 - down) * upper + down * lower
    return sampled[..., :-1] * sampled[..., -1:]


def _pixels(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """The pixels at integer coordinates [H, W], zero outside the image."""
    height, width, _ = image.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = jnp.clip(y, 0, height - 1).astype(int), jnp.clip(x, 0, width - 1).astype(int)
    return jnp.where(inside[..., None], image[y, x], 0)


def draw_color_jitter(
    keys: jax.Array, strengths: tuple[float, float, float, float]
) -> tuple[jax.Array, jax.Array]:
    """Draw the order and the factors of the adjustments whose strength is not 0.

    Args:
      strengths: x of brightness, contrast, saturation and hue (`AugmentConfig`); static.

    Returns:
      order [B, n] int32, each row a permutation of the n adjustments that are on, by index;
      factors [B, 4] by index: uniform in [max(0, 1 - x), 1 + x], for hue in [-x, x].
    """
    active = _active(strengths)
    draws = _draw(keys, _JITTER, len(active) + 4)
    order = jnp.argsort(draws[:, : len(active)], axis=1)
    low = [max(0.0, 1 - strength) for strength in strengths[:HUE]] + [-strengths[HUE]]
    high = [1 + strength for strength in strengths[:HUE]] + [strengths[HUE]]
    factors = _between(low, high, draws[:, len(active) :])
    return jnp.array(active, jnp.int32)[order], factors


def _active(strengths: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(index for index, strength in enumerate(strengths) if strength)


def color_jitter(
    images: jax.Array,
    order: jax.Array,
    factors: jax.Array,
    *,
    active: tuple[int, ...] = (BRIGHTNESS, CONTRAST, SATURATION, HUE),
) -> jax.Array:
    """torchvision's ColorJitter on floats in [0, 1]; images of one channel keep saturation and hue.

    Args:
      order: [B, n], indices of the adjustments in the order in which they are applied.
      factors: [B, 4], by index.
      active: the indices in `order`; static, so that other adjustments are not compiled.
    """
    factors = factors.astype(images.dtype)
    for step in range(order.shape[1]):
        images = _adjust(images, order[:, step], factors, active)
    return images


def _adjust(
    images: jax.Array, indices: jax.Array, factors: jax.Array, active: tuple[int, ...]
) -> jax.Array:
    """Apply adjustment `indices` [B], which may differ between images: brightness, contrast and
    saturation are one blend with different partners, and every image computes the hue."""
    factor = _per_image(jnp.take_along_axis(factors, indices[:, None], axis=1))
    index = _per_image(indices)
    gray = _gray(images)
    partner = jnp.zeros_like(gray)
    if CONTRAST in active:
        partner = jnp.where(index == CONTRAST, gray.mean((1, 2, 3), keepdims=True), partner)
    if SATURATION in active:
        partner = jnp.where(index == SATURATION, gray, partner)
    blended = jnp.clip(factor * images + (1 - factor) * partner, 0, 1)
    if images.shape[-1] == 1:
        return jnp.where(index <= CONTRAST, blended, images)
    if HUE in active:
        return jnp.where(index == HUE, _turn_hue(images, factor), blended)
    return blended


def _turn_hue(images: jax.Array, shifts: jax.Array) -> jax.Array:
    """Shift the hue in HSV by `shifts` [B, 1, 1, 1], shares of the hue circle."""
    red, green, blue = images[..., 0:1], images[..., 1:2], images[..., 2:3]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma == 0, 1, chroma)
    blue_or_green = jnp.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sextant = jnp.where(value == red, (green - blue) / safe, blue_or_green) + 6 * shifts

    def channel(offset):
        # A channel falls by the chroma as the hue moves away from the channel's own. The remainder
        # is written out because `%` is slow in XLA's CPU backend.
        distance = sextant + offset
        distance = distance - 6 * jnp.floor(distance / 6)
        return value - chroma * jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)

    return jnp.concatenate([channel(5), channel(3), channel(1)], axis=-1)


def _gray(images: jax.Array) -> jax.Array:
    """The luminance of the images, [B, H, W, 1]."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = images[..., 0:1], images[..., 1:2], images[..., 2:3]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def draw_erasing(keys: jax.Array, probability: float, height: int, width: int) -> jax.Array:
    """Draw rectangles [B, 4] int32 (top, left, height, width) in pixels; height 0 erases nothing.

    The first of ten draws of area (2% to 33%) and ratio (0.3 to 3.3, log-uniform) that fits counts.
    """
    draws = _draw(keys, _ERASING, 3 + 2 * _ERASING_TRIES)
    area, log_ratio = jnp.split(draws[:, 3:], 2, axis=1)  # [B, tries]
    area = height * width * _between(*_ERASING_AREA, area)
    ratio = jnp.exp(_between(*map(math.log, _ERASING_RATIO), log_ratio))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * ratio, area / ratio], -1))).astype(jnp.int32)
    room = jnp.array([[height, width]], jnp.int32)
    fits = (sides < room[:, None]).all(-1)
    first = jnp.take_along_axis(sides, fits.argmax(1)[:, None, None], axis=1)[:, 0]  # [B, 2]
    erased = fits.any(1) & (draws[:, 0] < probability)
    sides = jnp.where(erased[:, None], first, 0)
    place = (draws[:, 1:3] * (room - sides + 1).astype(jnp.float32)).astype(jnp.int32)
    return jnp.concatenate([place, sides], axis=1)


def erase(images: jax.Array, rectangles: jax.Array) -> jax.Array:
    """torchvision's RandomErasing with value 0, which follows normalisation.

    Args:
      rectangles: [B, 4] (top, left, height, width), in pixels.
    """
    top, left, height, width = (_per_image(column) for column in rectangles.T)
    y = jnp.arange(images.shape[1], dtype=rectangles.dtype).reshape(1, -1, 1, 1)
    x = jnp.arange(images.shape[2], dtype=rectangles.dtype).reshape(1, 1, -1, 1)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return jnp.where(inside, 0, images)


def draw_mix(
    key: jax.Array, config: AugmentConfig, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Draw the weights of the batch itself in MixUp or CutMix: float32, of its pixels, [] or
    [1, H, W, 1], and of its targets, []. Where both are on, one is drawn with equal chances.

    Args:
      key: a single key for the whole batch.
    """
    if not config.cutmix:
        lam = draw_mixup(key, config.mixup)
        return lam, lam
    pixels = outside(draw_box(key, config.cutmix, height, width), height, width)
    if config.mixup:
        lam = draw_mixup(key, config.mixup)
        chosen = jax.random.bernoulli(jax.random.fold_in(key, _CHOICE))
        pixels = jnp.where(chosen, lam, pixels)
    return pixels, pixels.mean()


def draw_box(key: jax.Array, alpha: float, height: int, width: int) -> jax.Array:
    """Draw torchvision's box for CutMix, [4] int32 (top, left, bottom, right): its centre is
    uniform, and its area before it is cut at the border a share 1 - Beta(alpha, alpha)."""
    share, centre = jax.random.split(jax.random.fold_in(key, _BOX))
    half = 0.5 * jnp.sqrt(1 - draw_mixup(share, alpha))
    sides = jnp.array([height, width], jnp.float32)
    middle = jnp.floor(jax.random.uniform(centre, (2,), jnp.float32) * sides)
    reach = jnp.floor(half * sides)
    corners = jnp.concatenate([middle - reach, middle + reach])
    return jnp.clip(corners, 0, jnp.tile(sides, 2)).astype(jnp.int32)


def outside(box: jax.Array, height: int, width: int) -> jax.Array:
    """A box [4] (top, left, bottom, right) -> [1, H, W, 1] float32, 0 inside and 1 outside."""
    top, left, bottom, right = box
    y, x = jnp.arange(height).reshape(1, -1, 1, 1), jnp.arange(width).reshape(1, 1, -1, 1)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return jnp.where(inside, 0.0, 1.0).astype(jnp.float32)


def draw_mixup(key: jax.Array, alpha: float) -> jax.Array:
    """Draw lambda, the weight of the batch itself, from Beta(alpha, alpha); scalar float32.

    Args:
      key: a single key for the whole batch, unlike the keys of the other draws.
    """
    return jax.random.beta(key, alpha, alpha, (), jnp.float32)


def mixup(batch: jax.Array, lam: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """torchvision's MixUp: lam * x + (1 - lam) * (x rolled by one example). CutMix is the same with
    a weight for each pixel.

    Args:
      batch: [B, ...], images or targets (one-hot or smoothed).
      lam: the weight of the batch itself, [], or of its pixels, [1, H, W, 1] (`draw_mix`).
      axis_name: axis that splits the batch; each device then passes one example on.
    """
    lam = lam.astype(batch.dtype)
    partners = jnp.roll(batch, 1, axis=0)
    if axis_name is not None:
        count = lax.axis_size(axis_name)
        ring = [(device, (device + 1) % count) for device in range(count)]
        partners = partners.at[0].set(lax.ppermute(batch[-1], axis_name, ring))
    return lam * batch + (1 - lam) * partners


def _draw(keys: jax.Array, stream: int, count: int) -> jax.Array:
    """Draw numbers [B, count], float32, uniform in [0, 1)."""

    def draw(key):
        return jax.random.uniform(jax.random.fold_in(key, stream), (count,), jnp.float32)

    return jax.vmap(draw)(keys)


def _between(low, high, draws: jax.Array) -> jax.Array:
    """Map draws from [0, 1) to [low, high); the bounds are numbers, or one for each column."""
    low, high = (jnp.array(bound, jnp.float32).reshape(1, -1) for bound in (low, high))
    return low + (high - low) * draws


def _per_image(values: jax.Array) -> jax.Array:
    """Reshape [B] to [B, 1, 1, 1]."""
    return values.reshape(-1, 1, 1, 1)
