"""Image folders and files for the tests of data, and checks of refusals."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from flax_resnet.config import DataConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError


def picture(seed=0, size=(12, 9), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def tiff(pixels, bits=16, tags=(), order="<"):
    """An uncompressed gray or RGB TIFF of these samples; `tags` adds or replaces SHORT tags."""
    data, shape = pixels.tobytes(), (*pixels.shape, 1)
    gray = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: 1, 277: 1, 278: shape[0]}
    entries = sorted((gray | {273: 8, 279: len(data)} | dict(tags)).items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    ifd = struct.pack(f"{order}H", len(entries))
    for tag, value in entries:
        kind = 4 if tag in (273, 279) else 3
        ifd += struct.pack(f"{order}HHI", tag, kind, 1)
        ifd += struct.pack(f"{order}I" if kind == 4 else f"{order}Hxx", value)
    return head + data + ifd + bytes(4)


def upright(orientation):
    """An EXIF header with this orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


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
