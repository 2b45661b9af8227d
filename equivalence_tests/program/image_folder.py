"""Folders of images for the tests of data, and what a refusal must say."""

import io

import numpy as np
import pytest
from PIL import Image

from flax_resnet.config import DataConfig, InputError
from flax_resnet.data.sources import open_dataset


def picture(seed=0, size=(12, 9), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def refused(dataset, *words, **fields):
    with pytest.raises(InputError) as error:
        opened = open_dataset(DataConfig(dataset=str(dataset), **fields))
        for split in (opened.train, opened.validation, opened.test):
            [split[index] for index in range(len(split))]
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def fill(folder, number=10, suffix=".png"):
    folder.mkdir(parents=True)
    for index in range(number):
        picture(index, size=(8 + index % 3, 8)).save(folder / f"{index:02}{suffix}")
