"""Decodes image files: the meaning of their samples, and a limit on the memory that they take."""

import contextlib
import ctypes
import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from flax_resnet.errors import InputError
from flax_resnet.text import most, printable

SUFFIXES = tuple(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm".split()
)

_LARGEST_RATIO = 200
"""Largest ratio of the sides: with 224 pixels on the shorter side, a line would take gigabytes."""

_LARGE = 1 << 27
"""Size in bytes of an image whose memory is returned to the system at once."""

_AT_ONCE = 4096  # images that are checked in one go
_NAMED = 5  # unreadable images that a message names
_LONGEST_NAME = 1000  # characters of a path in a message

# Only these decoders look at a file: some of PIL's others start programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_BYTES_A_PIXEL = 16
"""Most bytes per pixel that decoding, converting and resizing take, measured over all modes."""

# Numbers of TIFF tags.
_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 281, 320, 339

_UNKNOWN_DEPTH = (
    "its samples have room for {} bits, but the file does not say how many are used, and so not"
    " how bright they are; scale them to 8 or 16 bits"
)


class BadImage(InputError):
    """Raised for a file that is no image, is broken, or has samples without a known meaning."""


class _Budget:
    """A limit on the bytes of all images that are being decoded and resized. A thread waits until
    its image fits; an image larger than the limit is decoded alone."""

    def __init__(self, total: int):
        self._total, self._used = total, 0
        self._changed, self._own = threading.Condition(), threading.local()

    @contextlib.contextmanager
    def hold(self, resized: Callable[[int, int], int] = lambda width, height: 0):
        """A context for one image, whose end releases what the thread has taken inside. In nested
        contexts the outermost one decides and releases.

        Args:
          resized: pixels of what an image of some width and height is resized to.
        """
        if hasattr(self._own, "taken"):
            yield
            return
        self._own.taken, self._own.resized = 0, resized
        try:
            yield
        finally:
            taken = self._own.taken
            del self._own.taken
            if taken > _LARGE:
                _give_back()
            with self._changed:
                self._used -= taken
                self._changed.notify_all()

    def take(self, width: int, height: int):
        """Take the memory of the context's image, waiting until it is free. All is taken at once,
        because threads that hold a part of theirs would wait for one another."""
        own = self._own
        if own.taken:
            return
        size = (width * height + own.resized(width, height)) * _BYTES_A_PIXEL
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._total)
            own.taken = size
            self._used += size

    def share(self, count: int):
        """Leave to this process one of `count` equal parts of the limit."""
        self._total //= count


def _give_back():
    """Return the freed memory to the system that glibc would keep for each thread."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


MEMORY = _Budget(1 << 30)
"""The limit of a process that decodes, 1 GiB; worker processes share it."""


def read_image(
    path: str | os.PathLike, channels: int, *, exif_transpose: bool = False
) -> np.ndarray:
    """Decode an image file to uint8 [H, W, channels], as torchvision's ImageFolder does.

    Alpha is dropped, EXIF orientation is applied on request, one channel is PIL's "L". Gray of more
    than 8 bits is scaled by the number of bits that the file states.

    Raises:
      BadImage: the file is missing, no image or broken, its samples have no known black and white,
        it has more pixels than PIL.Image.MAX_IMAGE_PIXELS, or one side is more than 200 times the
        other.
    """
    if not os.path.isfile(path):
        other = "no regular file" if os.path.exists(path) else "no such file"
        why = "a folder" if os.path.isdir(path) else other
        raise BadImage(f"{printable(path, _LONGEST_NAME)}: not a readable image ({why})")
    return decode_image(path, channels, name=str(path), exif_transpose=exif_transpose)


def decode_image(
    file: str | os.PathLike | BinaryIO, channels: int, *, name: str, exif_transpose: bool = False
) -> np.ndarray:
    """Decode as `read_image` does, from an open file too; messages call it `name`."""
    if isinstance(file, str | os.PathLike):
        # Opened here: by name, Pillow maps a rotated TIFF into memory with the sides swapped.
        with open(file, "rb") as opened:
            return decode_image(opened, channels, name=name, exif_transpose=exif_transpose)
    try:
        with MEMORY.hold(), Image.open(file, formats=_FORMATS) as image:
            _check_size(*image.size)
            MEMORY.take(*image.size)
            pixels = np.asarray(_convert(image, channels, exif_transpose))
    except UnidentifiedImageError:
        reason = _unidentified(file)
    except Exception as error:  # decoders raise anything on a broken file
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 400)
    else:
        return pixels.reshape(*pixels.shape[:2], channels)
    raise BadImage(f"{printable(name, _LONGEST_NAME)}: not a readable image ({reason})")


def _unidentified(file: BinaryIO) -> str:
    """The reason for PIL's error, which is the same for a TIFF of samples that PIL lacks."""
    file.seek(0)
    is_tiff = file.read(4) in (b"II*\0", b"MM\0*")
    return "a TIFF of samples that Pillow does not read" if is_tiff else "no known format"


def _check_size(width: int, height: int):
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if width * height > limit:  # PIL would only warn
        raise ValueError(f"{width} x {height} pixels, more than {limit}")
    if max(width, height) > _LARGEST_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels, no picture but a line")


def _convert(image: Image.Image, channels: int, exif_transpose: bool) -> Image.Image:
    _check_samples(image)
    # These read fields that loading drops.
    deep, stated, scale = _is_deep(image), _stated_bits(image), _scale(image)
    image.load()
    if exif_transpose and _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # more than 8 bits of gray, which PIL would clip to 255
        image = Image.fromarray(scale(np.asarray(image)))
    elif deep:
        _check_high_bytes(image, stated)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours without PIL's warning
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _tag(image: Image.Image, tag: int):
    """The value of a TIFF tag, of the first sample if each has one; None in other formats."""
    value = image.tag_v2.get(tag) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _check_samples(image: Image.Image):
    """Raises ValueError if the file does not define black and white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if _tag(image, _SAMPLE_FORMAT) == 2 and _tag(image, _BITS) < 32:
        raise ValueError("signed samples have no known black and white")
    colours = image.tag_v2.get(_COLOUR_MAP) if image.format == "TIFF" else None
    if colours and 0 < max(colours) < 256:
        raise ValueError("the colours of its palette have 8 bits instead of TIFF's 16")


def _is_deep(image: Image.Image) -> bool:
    """True if the samples have 16 bits and the file states no unused ones."""
    layout = str(image.tile[0].args) if image.tile else ""
    return ";16" in layout or ", 65535)" in layout


def _scale(image: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """The function that converts the image's gray of more than 8 bits to uint8."""
    room = _tag(image, _BITS) or 16
    bits = room if room < 16 else None  # of 16 bits often only 12 are used
    if stated := _stated_bits(image):
        bits = stated
    elif image.format == "PPM" and not _is_deep(image):  # PIL has scaled by the stated maximum
        bits = 16
    inverted = _tag(image, _PHOTOMETRIC) == 0
    return functools.partial(_eight_bits, room=room, bits=bits, inverted=inverted)


def _stated_bits(image: Image.Image) -> int | None:
    """The bits of the largest possible sample that the file states, if that is 2^n - 1 (another
    number is a statistic of the image)."""
    white = _tag(image, _MAX_SAMPLE)
    return white.bit_length() if white and white >= 255 and white & (white + 1) == 0 else None


def _eight_bits(pixels: np.ndarray, room: int, bits: int | None, inverted: bool) -> np.ndarray:
    """The highest 8 of the `bits` of each sample, which is stored in `room` bits."""
    low, high = int(pixels.min()), int(pixels.max())
    bits = bits or _used_bits(high, room)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"samples from {low} to {high} are not of {bits} bits")
    gray = (pixels >> max(bits - 8, 0)).astype(np.uint8)
    return 255 - gray if inverted else gray


def _used_bits(high: int, room: int) -> int:
    """The bits of samples up to `high`, if the file does not state them."""
    if high == 0 or (room == 32 and high < 256):
        return 8
    if high < 1 << 14:
        raise ValueError(f"{_UNKNOWN_DEPTH.format(room)}: they end at {high}")
    return 16


def _check_high_bytes(image: Image.Image, stated: int | None):
    """Raises ValueError if colours use too few bits; PIL has kept the high byte of each sample."""
    if stated and stated < 16:
        raise ValueError(
            f"its colours have {stated} of 16 bits, of which Pillow keeps the highest 8; scale them"
            " to 8 or 16 bits"
        )
    bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True)
    if max(high for band, (_, high) in bands if band != "A") < 1 << 6:
        raise ValueError(f"{_UNKNOWN_DEPTH.format(16)}: the highest two are never used")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of the orientation; 1, which is upright, if the EXIF is missing or broken."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def is_turned(file: str | os.PathLike | BinaryIO) -> bool:
    """True if the header of an image has an EXIF orientation that `exif_transpose` would apply;
    False for a file that is no image."""
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
        return False  # opening a pipe would wait for ever
    with contextlib.suppress(Exception), Image.open(file, formats=_FORMATS) as image:
        has_exif = image.format in ("JPEG", "MPO") or any("exif" in str(key) for key in image.info)
        # PIL itself turns a TIFF.
        return has_exif and image.format != "TIFF" and 2 <= _orientation(image) <= 8
    return False


def bad_images(paths: list[str], channels: int) -> dict[str, str]:
    """{path: reason} of the files that `read_image` refuses; all files are decoded, in threads."""

    def check(path):
        try:
            read_image(path, channels)
        except BadImage as error:
            return reason(error)

    bad = {}
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _AT_ONCE):  # a million tasks would fill the memory
            part = paths[start : start + _AT_ONCE]
            bad |= {p: why for p, why in zip(part, pool.map(check, part), strict=True) if why}
    return bad


def reason(error: BadImage) -> str:
    """The message of the error without the name of the file."""
    return "not a readable image" + str(error).rpartition(": not a readable image")[2]


def refusal(errors: list[BadImage], more: str = "") -> InputError:
    """One error for all bad images; its message ends with `more`, the advice."""
    if len(errors) == 1:
        return InputError(f"{errors[0]}{more}")
    shown = most(_NAMED)
    named = ", ".join(map(str, errors[:shown]))
    others = f" and {len(errors) - shown:,} more" if len(errors) > shown else ""
    return InputError(f"{len(errors):,} images cannot be read: {named}{others}{more}")
