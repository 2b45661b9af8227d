"""Image files: decoding one, and listing a tree of them by class."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_resnet.config import InputError

SUFFIXES = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())

_LONGEST = 200
"""Times the shorter side that the longer may be: at 224 pixels a line would take gigabytes."""

# Only these decoders look at a file: some of PIL's others start programs, such as Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_image(path: str | os.PathLike, channels: int) -> np.ndarray:
    """One image file as uint8 [H, W, channels], decoded like torchvision's ImageFolder: alpha is
    dropped, EXIF orientation is not applied, one channel is PIL's "L". 16-bit gray is scaled.

    Raises:
      InputError: no file, no image, a broken one, more pixels than PIL.Image.MAX_IMAGE_PIXELS, or
        one side more than 200 times the other.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a readable image (no such file)")
    return decode_image(path, channels, name=str(path))


def decode_image(file: str | os.PathLike | BinaryIO, channels: int, *, name: str) -> np.ndarray:
    """`read_image` for an open file too; `name` is what the message calls it."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS or math.inf
            if image.width * image.height > limit:  # where PIL would only warn
                raise ValueError(f"{image.width} x {image.height} pixels, more than {limit}")
            if max(image.size) > _LONGEST * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels, no picture but a line")
            pixels = np.asarray(_convert(image, channels))
    except UnidentifiedImageError:
        raise InputError(f"{name}: not a readable image (no known format)") from None
    except Exception as error:  # decoders raise anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: not a readable image ({reason})") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits of gray, which PIL would clip to 255
        image = Image.fromarray(_high_byte(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours without PIL's warning
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _high_byte(pixels: np.ndarray) -> np.ndarray:
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("pixels of more than 16 bits")
    return (pixels >> 8).astype(np.uint8)


def bad_images(paths: list[str], channels: int) -> dict[str, str]:
    """path -> reason of the files that `read_image` refuses; decodes every one, in threads."""

    def check(path):
        try:
            read_image(path, channels)
        except InputError as error:
            return str(error).removeprefix(f"{path}: ")

    with ThreadPoolExecutor() as pool:
        checked = zip(paths, pool.map(check, paths), strict=True)
        return {path: reason for path, reason in checked if reason}


_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


def list_splits(root: Path) -> tuple[dict[str, dict[str, list[str]]], int]:
    """split -> class -> image paths of the data set in a folder (`sources.open_dataset` says which
    layouts there are), and the number of files that are not named as images.

    Raises:
      InputError: another layout, fewer than two classes, splits of different classes, a class
        whose name is not UTF-8, a symbolic link that leads out of `root`.
    """
    splits, ignored = {}, 0
    for split, folder in _split_folders(root).items():
        splits[split], others = _list_classes(folder, root)
        ignored += others
        _check_classes(folder, list(splits[split]), list(splits["train"]))
    return splits, ignored


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder, the training split first."""
    if not root.is_dir():
        raise InputError(f"folder:{root}: no such folder")
    found = {path.name: path for path in _folders_in(root, root)}
    if not found.keys() & _FOLDERS.keys():
        return {"train": root}
    unknown = sorted(found.keys() - _FOLDERS.keys())
    if "train" not in found or unknown or {"val", "validation"} <= found.keys():
        raise InputError(
            f"folder:{root}: has the folders {', '.join(found)}; it must have train and one or "
            "both of val (or validation) and test, or class folders only"
        )
    return {_FOLDERS[name]: found[name] for name in sorted(found, key=list(_FOLDERS).index)}


def _list_classes(folder: Path, root: Path) -> tuple[dict[str, list[str]], int]:
    """The image paths of each class folder, both by name, and the number of files beside them
    that are not named as images."""
    classes, ignored = {}, 0
    for class_folder in _folders_in(folder, root):
        _check_name(class_folder)
        files = list(_files(class_folder, root))
        classes[class_folder.name] = [f for f in files if f.lower().endswith(SUFFIXES)]
        ignored += len(files) - len(classes[class_folder.name])
    return classes, ignored


def _check_name(class_folder: Path):
    try:
        class_folder.name.encode()
    except UnicodeEncodeError:  # no file could be written that names the class
        raise InputError(
            f"{str(class_folder)!r}: the name of the class is not UTF-8; rename it"
        ) from None


def _check_classes(folder: Path, classes: list[str], expected: list[str]):
    if len(classes) < 2:
        found = f"only the class folder {classes[0]}" if classes else "no class folder"
        raise InputError(f"{folder}: {found}; it must have a folder of images for each class")
    if classes != expected:
        missing, extra = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
        raise InputError(
            f"{folder}: not the classes of the training split: missing {', '.join(missing) or '-'}"
            f", extra {', '.join(extra) or '-'}"
        )


def _folders_in(folder: Path, root: Path) -> list[Path]:
    """The visible folders in a folder, by name."""
    return [Path(entry.path) for entry in _entries(folder, root) if entry.is_dir()]


def _files(folder: str | Path, root: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    here = Path(folder).resolve()
    if here in above:
        raise InputError(f"{folder}: symbolic link to a folder that contains it")
    for entry in _entries(folder, root):
        if entry.is_dir():
            yield from _files(entry.path, root, (*above, here))
        else:
            yield entry.path


def _entries(folder: str | Path, root: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as scan:
        entries = [entry for entry in scan if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root.resolve()):
            raise InputError(f"{entry.path}: symbolic link that leads out of {root}")
    return sorted(entries, key=lambda entry: entry.name)
