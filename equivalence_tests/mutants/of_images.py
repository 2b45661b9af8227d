"""Faults of resizing and augmentation."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from equivalence_tests.mutants.mutant import Mutant
from flax_resnet.data import augment, pipeline, policies
from flax_resnet.training import steps


def _resample(method, **options):
    def resize(image, shape, interpolation):
        resized = jax.image.resize(
            jnp.asarray(image, jnp.float32), (*shape, image.shape[-1]), method, **options
        )
        return np.asarray(jnp.clip(jnp.round(resized), 0, 255), np.uint8)

    return [(pipeline, "_resize", resize)]


def _bicubic(image, shape, interpolation):
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    return resized.reshape(*shape, image.shape[-1])


def _half_by_half(image, size):
    top, left = (s // 2 - size // 2 for s in image.shape[:2])
    return image[top : top + size, left : left + size]


def _rounded_side(self, image, rng=None):
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = [round(self.resize * side / short) for side in (height, width)]
    resized = pipeline._resize(image, scaled, self.interpolation)
    return pipeline._centre_crop(resized, self.size)


def _additive_brightness(images, indices, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, indices[:, None], axis=1))
    brighter = jnp.clip(images + factor - 1, 0, 1)
    is_brightness = augment._per_image(indices) == augment.BRIGHTNESS
    return jnp.where(is_brightness, brighter, _ADJUST(images, indices, factors, active))


def _contrast_around_channels(images, indices, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, indices[:, None], axis=1))
    mean = images.mean((1, 2), keepdims=True)
    blended = jnp.clip(factor * images + (1 - factor) * mean, 0, 1)
    is_contrast = augment._per_image(indices) == augment.CONTRAST
    return jnp.where(is_contrast, blended, _ADJUST(images, indices, factors, active))


def _saturation_in_hsv(images, indices, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, indices[:, None], axis=1))
    value = images.max(-1, keepdims=True)
    blended = jnp.clip(value - factor * (value - images), 0, 1)
    is_saturation = augment._per_image(indices) == augment.SATURATION
    return jnp.where(is_saturation, blended, _ADJUST(images, indices, factors, active))


def _sorted_order(images, order, factors, **options):
    return _COLOR_JITTER(images, jnp.sort(order, axis=1), factors, **options)


def _unclamped(images, indices, factors, active):
    factor = augment._per_image(jnp.take_along_axis(factors, indices[:, None], axis=1))
    partner = _ADJUST(images, indices, jnp.zeros_like(factors), active)
    blended = factor * images + (1 - factor) * partner
    is_hue = augment._per_image(indices) == augment.HUE
    return jnp.where(is_hue, _ADJUST(images, indices, factors, active), blended)


def _padded_with_the_edge(images, offsets, padding):
    around = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    padded = jnp.pad(images, around, mode="edge")

    def cut(image, top, left):
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(cut)(padded, *offsets.T)


def _upside_down(images, mirrored):
    return jnp.where(augment._per_image(mirrored), images[:, ::-1], images)


def _mirrored(images, mirrored):
    return jnp.where(augment._per_image(mirrored), images[:, :, ::-1], images)


def _clockwise(images, angles, **options):
    return _ROTATE(images, -angles, **options)


def _erased_before_normalising(state, batch, config, preprocess, **options):
    unit, mean = preprocess.to_unit, preprocess.mean
    late = types.SimpleNamespace(to_unit=unit, mean=mean, normalize=lambda images: images)
    prepared = _PREPARE_BATCH(state, batch, config, late, **options)
    images = preprocess.normalize(prepared.images)  # normalising commutes with mixing
    return prepared._replace(images=images)


def _mixed_with_the_reversed_batch(batch, lam, **options):
    lam = lam.astype(batch.dtype)
    return lam * batch + (1 - lam) * batch[::-1]


def _areas_of_a_quarter(image, rng, *bounds):
    height, width = image.shape[:2]
    while True:
        cut = _RANDOM_AREA(image, rng, *bounds)
        if cut.shape[0] * cut.shape[1] >= height * width / 4:
            return cut


def _sheared_around_the_centre(operation, argument, height, width):
    return _MATRIX(operation, argument, 0, 0)


def _equalized_by_shares(channel):
    counts = jnp.zeros(256, jnp.int32).at[channel.ravel()].add(1)
    return jnp.cumsum(counts) * 255 // channel.size


def _with_the_area_drawn(key, config, height, width):
    pixels, share = _DRAW_MIX(key, config, height, width)
    if not config.cutmix:
        return pixels, share
    return pixels, augment.draw_mixup(key, config.cutmix)


def _box_across(box, height, width):
    top, left, bottom, right = box
    return _OUTSIDE(jnp.stack([left, top, right, bottom]), height, width)


def _without_classes(order, epoch):
    return _EPOCH(dataclasses.replace(order, labels=None), epoch)


_EPOCH = pipeline._epoch
_DRAW_MIX, _OUTSIDE = augment.draw_mix, augment.outside
_MATRIX = policies._matrix
_ADJUST, _COLOR_JITTER = augment._adjust, augment.color_jitter
_ROTATE, _RANDOM_AREA = augment.rotate, pipeline._random_area
_PREPARE_BATCH = steps.prepare_batch

MUTANTS = [
    Mutant(
        name="resized without antialias",
        difference="30a",
        what="images shrink without antialiasing, as torch's tensors do",
        patches=_resample("bilinear", antialias=False),
    ),
    Mutant(
        name="resized to the nearest",
        difference="30b",
        what="resizing takes the nearest pixel",
        patches=_resample("nearest"),
    ),
    Mutant(
        name="resized bicubically",
        difference="30c",
        what="resizing is bicubic",
        patches=[(pipeline, "_resize", _bicubic)],
    ),
    Mutant(
        name="crop half by half",
        difference="31a",
        what="the centre crop starts at H // 2 - h // 2",
        patches=[(pipeline, "_centre_crop", _half_by_half)],
    ),
    Mutant(
        name="longer side rounded",
        difference="31b",
        what="the longer side is rounded instead of truncated",
        patches=[(pipeline.Decoder, "__call__", _rounded_side)],
    ),
    Mutant(
        name="additive brightness",
        difference="32a",
        what="brightness is added instead of multiplied",
        patches=[(augment, "_adjust", _additive_brightness)],
    ),
    Mutant(
        name="contrast around each channel",
        difference="32b",
        what="contrast is around each channel's mean instead of the gray one",
        patches=[(augment, "_adjust", _contrast_around_channels)],
    ),
    Mutant(
        name="saturation in HSV",
        difference="32c",
        what="saturation blends towards the value of HSV instead of gray",
        patches=[(augment, "_adjust", _saturation_in_hsv)],
    ),
    Mutant(
        name="jitter in a fixed order",
        difference="32d",
        what="brightness, contrast, saturation and hue always come in this order",
        patches=[(augment, "color_jitter", _sorted_order)],
    ),
    Mutant(
        name="jitter not clamped",
        difference="32e",
        what="colours may leave [0, 1]",
        patches=[(augment, "_adjust", _unclamped)],
    ),
    Mutant(
        name="crop padded with the edge",
        difference="34a",
        what="the random crop repeats the border instead of padding with black",
        patches=[(augment, "crop", _padded_with_the_edge)],
    ),
    Mutant(
        name="flipped upside down",
        difference="34b",
        what="the flip swaps top and bottom",
        patches=[(augment, "flip", _upside_down)],
    ),
    Mutant(
        name="vertical flip to the side",
        difference="34g",
        what="the vertical flip swaps left and right",
        patches=[(augment, "flip_vertically", _mirrored)],
    ),
    Mutant(
        name="rotated clockwise",
        difference="34c",
        what="angles turn clockwise",
        patches=[(augment, "rotate", _clockwise)],
    ),
    Mutant(
        name="erased before normalising",
        difference="34d",
        what="random erasing leaves black instead of the mean colour",
        patches=[(steps, "prepare_batch", _erased_before_normalising)],
    ),
    Mutant(
        name="mixed with the reversed batch",
        difference="34e",
        what="mixup's partner is the batch reversed, as timm's, instead of the next example",
        patches=[(augment, "mixup", _mixed_with_the_reversed_batch)],
    ),
    Mutant(
        name="CutMix by the area drawn",
        difference="34j",
        what="the targets of CutMix have the area that was drawn, not what is left at the border",
        patches=[(augment, "draw_mix", _with_the_area_drawn)],
    ),
    Mutant(
        name="CutMix across",
        difference="34k",
        what="rows and columns of CutMix's box are swapped",
        patches=[(augment, "outside", _box_across)],
    ),
    Mutant(
        name="copies share their draws",
        difference="34l",
        what="all copies of an image in a batch are augmented in the same way",
        patches=[(pipeline, "_copies_before", np.zeros_like)],
    ),
    Mutant(
        name="balanced draws ignore the classes",
        difference="34m",
        what="balanced draws are a permutation of all images",
        patches=[(pipeline, "_epoch", _without_classes)],
    ),
    Mutant(
        name="sheared around the centre",
        difference="34h",
        what="the shears of automatic augmentation keep the centre instead of the corner",
        patches=[(policies, "_matrix", _sheared_around_the_centre)],
    ),
    Mutant(
        name="equalized by shares",
        difference="34i",
        what="equalising maps a level to the share of pixels up to it, without Pillow's steps",
        patches=[(policies, "_equalize", _equalized_by_shares)],
    ),
    Mutant(
        name="random areas of a quarter",
        difference="34f",
        what="the random resized crop takes at least 25% of the image instead of 8%",
        patches=[(pipeline, "_random_area", _areas_of_a_quarter)],
    ),
]
