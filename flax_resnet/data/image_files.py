"""One image file -> pixels: what a format means by its samples, and the memory that it takes."""

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

_LONGEST = 200
"""Times the shorter side that the longer may be: at 224 pixels a line would take gigabytes."""

_LARGE = 1 << 27
"""Bytes of an image after which memory is given back."""

_AT_ONCE = 4096  # images that are checked
_NAMED = 5  # of those that cannot be read
_LONGEST_NAME = 1000  # characters of a path in a message

# Only these decoders look at a file: some of PIL's others start programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_BYTES_A_PIXEL = 16
"""That decoding, converting and resizing an image take at most, measured over the modes."""

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _MAX_SAMPLE, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 262, 281, 320, 339

_UNKNOWN_DEPTH = (
    "its samples have room for {} bits, but the file does not say how many they have, and so not"
    " how bright they are; scale them to 8 or 16 bits"
)


class BadImage(InputError):
    """A file that is no image, a broken one, or one whose samples have no known meaning."""


class _Budget:
    """Bytes that the images in the making take together. Whoever wants more waits until others
    are done; an image that alone takes more than all is decoded alone."""

    def __init__(self, total: int):
        self._total, self._used = total, 0
        self._changed, self._own = threading.Condition(), threading.local()

    @contextlib.contextmanager
    def hold(self):
        """Gives back at its end what the thread has taken inside, for one image; a second one
        inside the first leaves that to the first."""
        if hasattr(self._own, "taken"):
            yield
            return
        self._own.taken = 0
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

    def take(self, size: int):
        """Waits until so many bytes are free."""
        own = self._own
        with self._changed:
            self._changed.wait_for(
                lambda: self._used == own.taken or self._used + size <= self._total
            )
            own.taken += size
            self._used += size


def _give_back():
    """What glibc would keep for each thread that has decoded a large image."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


MEMORY = _Budget(1 << 30)
"""Of this process."""


def read_image(
    path: str | os.PathLike, channels: int, *, exif_transpose: bool = False
) -> np.ndarray:
    """One image file as uint8 [H, W, channels], decoded like torchvision's ImageFolder: alpha is
    dropped, EXIF orientation is applied on request, one channel is PIL's "L". Gray of more than 8
    bits is scaled by the bits that the file says.

    Raises:
      BadImage: no file, no image, a broken one, samples whose black and white are not known, more
        pixels than PIL.Image.MAX_IMAGE_PIXELS, or one side more than 200 times the other.
    """
    if not os.path.isfile(path):
        why = "a folder" if os.path.isdir(path) else "no such file"
        raise BadImage(f"{printable(path, _LONGEST_NAME)}: not a readable image ({why})")
    return decode_image(path, channels, name=str(path), exif_transpose=exif_transpose)


def decode_image(
    file: str | os.PathLike | BinaryIO, channels: int, *, name: str, exif_transpose: bool = False
) -> np.ndarray:
    """`read_image` for an open file too; `name` is what the message calls it."""
    if isinstance(file, str | os.PathLike):
        # Not by its name: Pillow then maps a turned TIFF into memory with the sides swapped.
        with open(file, "rb") as opened:
            return decode_image(opened, channels, name=name, exif_transpose=exif_transpose)
    try:
        with MEMORY.hold(), Image.open(file, formats=_FORMATS) as image:
            _check_size(*image.size)
            MEMORY.take(image.width * image.height * _BYTES_A_PIXEL)
            pixels = np.asarray(_convert(image, channels, exif_transpose))
    except UnidentifiedImageError:
        reason = _unidentified(file)
    except Exception as error:  # decoders raise anything on a broken file
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 400)
    else:
        return pixels.reshape(*pixels.shape[:2], channels)
    raise BadImage(f"{printable(name, _LONGEST_NAME)}: not a readable image ({reason})")


def _unidentified(file: str | os.PathLike | BinaryIO) -> str:
    """Why PIL finds nothing to decode: it says the same of a TIFF with other samples."""
    with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as stream:
        stream.seek(0)
        is_tiff = stream.read(4) in (b"II*\0", b"MM\0*")
    return "a TIFF of samples that Pillow does not read" if is_tiff else "no known format"


def _check_size(width: int, height: int):
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if width * height > limit:  # where PIL would only warn
        raise ValueError(f"{width} x {height} pixels, more than {limit}")
    if max(width, height) > _LONGEST * min(width, height):
        raise ValueError(f"{width} x {height} pixels, no picture but a line")


def _convert(image: Image.Image, channels: int, exif_transpose: bool) -> Image.Image:
    _check_samples(image)
    # Loading drops what they look at.
    deep, said, scale = _is_deep(image), _bits_said(image), _scale(image)
    image.load()
    if exif_transpose and _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # more than 8 bits of gray, which PIL would clip to 255
        image = Image.fromarray(scale(np.asarray(image)))
    elif deep:
        _check_high_bytes(image, said)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours without PIL's warning
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _tag(image: Image.Image, tag: int):
    """What a TIFF says, of the first sample where it says so of each; None of other formats."""
    value = image.tag_v2.get(tag) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _check_samples(image: Image.Image):
    """Raises ValueError where the file does not say what is black and what is white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if _tag(image, _SAMPLE_FORMAT) == 2 and _tag(image, _BITS) < 32:
        raise ValueError("signed samples have no known black and white")
    colours = image.tag_v2.get(_COLOUR_MAP) if image.format == "TIFF" else None
    if colours and 0 < max(colours) < 256:
        raise ValueError("the colours of its palette have 8 bits where TIFF has 16")


def _is_deep(image: Image.Image) -> bool:
    """Whether its samples have 16 bits and none is said to be unused."""
    layout = str(image.tile[0].args) if image.tile else ""
    return ";16" in layout or ", 65535)" in layout


def _scale(image: Image.Image) -> Callable[[np.ndarray], np.ndarray]:
    """How its gray of more than 8 bits becomes uint8."""
    room = _tag(image, _BITS) or 16
    bits = room if room < 16 else None  # in 16 bits there are often 12
    if said := _bits_said(image):
        bits = said
    elif image.format == "PPM" and not _is_deep(image):  # PIL scales by the maximum that it says
        bits = 16
    inverted = _tag(image, _PHOTOMETRIC) == 0
    return functools.partial(_eight_bits, room=room, bits=bits, inverted=inverted)


def _bits_said(image: Image.Image) -> int | None:
    """By its largest possible sample, where that is 2^n - 1: a depth, and no statistic."""
    white = _tag(image, _MAX_SAMPLE)
    return white.bit_length() if white and white >= 255 and white & (white + 1) == 0 else None


def _eight_bits(pixels: np.ndarray, room: int, bits: int | None, inverted: bool) -> np.ndarray:
    """The high 8 of the bits that a sample has, of the `room` that there is for them."""
    low, high = int(pixels.min()), int(pixels.max())
    bits = bits or _bits_seen(high, room)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"samples from {low} to {high} are not of {bits} bits")
    gray = (pixels >> max(bits - 8, 0)).astype(np.uint8)
    return 255 - gray if inverted else gray


def _bits_seen(high: int, room: int) -> int:
    """Bits of samples up to `high`, where the file leaves it open."""
    if high == 0 or (room == 32 and high < 256):
        return 8
    if high < 1 << 14:
        raise ValueError(f"{_UNKNOWN_DEPTH.format(room)}: they end at {high}")
    return 16


def _check_high_bytes(image: Image.Image, said: int | None):
    """As `_bits_seen`, for colours; PIL has kept the high byte of each sample."""
    if said and said < 16:
        raise ValueError(
            f"its colours have {said} of 16 bits, of which Pillow keeps the highest 8; scale them"
            " to 8 or 16 bits"
        )
    bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True)
    if max(high for band, (_, high) in bands if band != "A") < 1 << 6:
        raise ValueError(f"{_UNKNOWN_DEPTH.format(16)}: the highest two are never used")


def _orientation(image: Image.Image) -> int:
    """EXIF's number; 1 is upright, and what has no EXIF, or a broken one, is too."""
    with contextlib.suppress(Exception):
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def is_turned(file: str | os.PathLike | BinaryIO) -> bool:
    """Whether an image has an EXIF orientation that `exif_transpose` would apply, from its header
    alone; False of what is no image."""
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file):
        return False  # opening a pipe would wait for ever
    with contextlib.suppress(Exception), Image.open(file, formats=_FORMATS) as image:
        said = image.format in ("JPEG", "MPO") or any("exif" in str(key) for key in image.info)
        return said and image.format != "TIFF" and 2 <= _orientation(image) <= 8
    return False  # PIL itself turns a TIFF


def bad_images(paths: list[str], channels: int) -> dict[str, str]:
    """path -> reason of the files that `read_image` refuses; decodes every one, in threads."""

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
    """Its message without the name of the file."""
    return "not a readable image" + str(error).rpartition(": not a readable image")[2]


def refusal(errors: list[BadImage], more: str) -> InputError:
    """One error for all of them, which ends with what can be done."""
    if len(errors) == 1:
        return InputError(f"{errors[0]}{more}")
    shown = most(_NAMED)
    named = ", ".join(map(str, errors[:shown]))
    others = f" and {len(errors) - shown:,} more" if len(errors) > shown else ""
    return InputError(f"{len(errors):,} images cannot be read: {named}{others}{more}")
