"""Pixels of image files."""

import os

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from flax_resnet.errors import InputError

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jpe", ".jfif", ".apng", ".pbm", ".pnm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others may start programs


def read_image(path: str | os.PathLike, *, exif_transpose: bool = False) -> Image.Image:
    """A file's image as RGB, as ImageFolder's, or upright by its EXIF orientation; but gray of more
    than 8 bits is scaled by them, where Pillow would clip.

    Raises:
      InputError: no image, a broken one, samples of unknown depth, or more pixels than
        PIL.Image.MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):  # Pillow: a warning
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            depth = Depth(image)
            upright = ImageOps.exif_transpose(image) if exif_transpose else image
            return depth.eight_bits(upright).convert("RGB")
    except Exception as error:  # decoders raise anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is no image: {reason}") from error


class Depth:
    """The number of bits of an image's samples, from its header."""

    def __init__(self, image: Image.Image):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        first = {tag: np.ravel(value)[0] for tag, value in tags.items() if tag in (258, 281, 339)}
        self.room, white = int(first.get(258, 16)), int(first.get(281, 0))
        if image.mode == "F" or (first.get(339) == 2 and self.room < 32):
            raise ValueError("floating-point and signed samples have no known range")
        if 0 < max(tags.get(320, (0,))) < 256:
            raise ValueError("the palette has colours of 8 bits, not 16")
        layout = str([tile.args for tile in image.tile])
        self.full = ";16" in layout or ", 65535)" in layout  # which is also said of fewer bits
        self.inverted = tags.get(262) == 0
        self.bits = None
        if white >= 255 and np.log2(white + 1) % 1 == 0:
            self.bits = int(np.log2(white + 1))
        elif self.room < 16:
            self.bits = self.room
        elif image.format == "PPM" and not self.full:
            self.bits = 16  # scaled by Pillow

    def eight_bits(self, image: Image.Image) -> Image.Image:
        """Deep gray by its high bits; other images as they are."""
        if not image.mode.startswith("I"):
            bands = [np.asarray(image.getchannel(k)) for k in image.getbands() if k != "A"]
            if self.full and max(band.max() for band in bands) < 64:
                raise ValueError("samples with room for 16 bits may have fewer")
            return image
        pixels = np.asarray(image)
        bits = self.bits or self.seen(pixels.max())
        if pixels.min() < 0 or pixels.max() >= 2**bits:
            raise ValueError(f"samples that are not of {bits} bits")
        pixels = (pixels >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(255 - pixels if self.inverted else pixels)

    def seen(self, highest: int) -> int:
        """The number of bits that the largest sample needs."""
        if highest == 0 or (self.room == 32 and highest < 256):
            return 8
        if highest < 2**14:
            raise ValueError(f"samples with room for {self.room} bits end at {highest}")
        return 16
