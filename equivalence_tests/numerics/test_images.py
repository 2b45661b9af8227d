"""Resizing, cropping and random areas equal torchvision's.

Resizing and cropping are compared bit for bit on PIL images, random areas by their distribution.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from equivalence_tests.parity import inputs
from flax_resnet.data import pipeline
from flax_resnet.data.pipeline import Decoder

pytestmark = pytest.mark.quick


def picture(height, width, channels=3):
    return inputs.random_numbers().integers(0, 256, (height, width, channels)).astype(np.uint8)


def torchvisions(image, resize, size, method=transforms.InterpolationMode.BILINEAR):
    pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    pil = functional.center_crop(functional.resize(pil, resize, method), [size, size])
    return np.asarray(pil).reshape(size, size, -1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "height,width,resize,size",
    [
        (50, 70, 40, 32),
        (70, 50, 40, 33),
        (31, 31, 48, 40),
        (64, 48, 48, 47),
        (33, 97, 32, 31),
        (50, 77, 40, 40),
    ],
)
def test_resize_and_centre_crop_are_torchvisions(height, width, resize, size, channels):
    image = picture(height, width, channels)
    got = Decoder(size=size, resize=resize)(image)
    np.testing.assert_array_equal(got, torchvisions(image, resize, size))
    assert got.dtype == np.uint8 and got.shape == (size, size, channels)


@pytest.mark.parametrize("method", ["bicubic", "nearest"])
def test_other_filters_are_pillows(method):
    image = picture(50, 70)
    got = Decoder(size=33, resize=40, interpolation=method)(image)
    expected = torchvisions(image, 40, 33, transforms.InterpolationMode(method))
    np.testing.assert_array_equal(got, expected)
    other = Decoder(size=33, resize=40)(image)
    assert np.abs(got.astype(int) - other).max() > 8


def test_an_image_of_the_right_size_is_left_alone():
    image = picture(32, 32)
    np.testing.assert_array_equal(Decoder(size=32, resize=32)(image), image)


@pytest.mark.parametrize(
    "bounds",
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.6), (0.5, 1.2)), ((0.9, 1.0), (3.0, 4.0))],
)
def test_random_resized_crop_draws_areas_and_ratios_as_torchvision(bounds):
    """Means of area and log-ratio over 4,000 draws agree within 5 sigma."""
    image, rng = picture(60, 80), inputs.random_numbers()
    areas, ratios = [], []
    for _ in range(4000):
        height, width = pipeline._random_area(image, rng, *bounds).shape[:2]
        areas.append(height * width)
        ratios.append(np.log(width / height))
    torch.manual_seed(inputs.SEED)
    blank = torch.zeros(3, 60, 80)
    draw = transforms.RandomResizedCrop.get_params
    params = [draw(blank, *map(list, bounds)) for _ in range(4000)]
    for got, expected in (
        (areas, [h * w for *_, h, w in params]),
        (ratios, [np.log(w / h) for *_, h, w in params]),
    ):
        sigma = np.hypot(np.std(got), np.std(expected)) / np.sqrt(4000)
        assert abs(np.mean(got) - np.mean(expected)) <= 5 * sigma
        assert np.std(got) == pytest.approx(np.std(expected), rel=0.1)
