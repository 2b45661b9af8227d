"""Folders of images: which file is of which split and class, and its pixels."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
SUFFIXES = (*IMG_EXTENSIONS, ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others may start programs


def list_folder(root: Path) -> tuple[dict[str, list[list[str]]], list[str]]:
    """{split: the image files of each class}, and the names of the classes.

    In DIR lie train and one or both of val (or validation) and test, each with one folder of
    images a class; or these class folders alone, which are "train".

    Raises:
      ValueError: another layout, one class only, a class without images, splits of different
        classes, a link out of DIR.
    """
    root = Path(os.path.expanduser(root))  # which leaves the home of nobody as it is
    folders = {split: subfolders(path, root) for split, path in split_folders(root).items()}
    class_names = list(folders["train"])
    if len(class_names) < 2:
        raise ValueError(f"{root} needs a folder of images for each of two classes or more")
    for split, classes in folders.items():
        if different := sorted(classes.keys() ^ set(class_names)):
            where = "this split alone" if different[0] in classes else "the training split alone"
            raise ValueError(f"{root}, {split}: the class {different[0]!r} is in {where}")
    images = {k: [images_in(path, root) for path in v.values()] for k, v in folders.items()}
    return images, class_names


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder, "train" first."""
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    found = subfolders(root, root)
    if not found.keys() & SPLITS.keys():
        return {"train": root}
    both = {"val", "validation"} <= found.keys()
    if "train" not in found or both or not found.keys() <= SPLITS.keys():
        raise ValueError(
            f"{root} has the folders {', '.join(found)} instead of train and one or both of val"
            " (or validation) and test, or of class folders alone"
        )
    return {split: found[name] for name, split in SPLITS.items() if name in found}


def subfolders(folder: Path, root: Path) -> dict[str, Path]:
    return {entry.name: Path(entry) for entry in entries(folder, root) if entry.is_dir()}


def images_in(class_folder: Path, root: Path) -> list[str]:
    images = [file for file in files_in(class_folder, root) if file.lower().endswith(SUFFIXES)]
    if not images:
        raise ValueError(f"{class_folder} has no images; add some or remove the class")
    return images


def files_in(folder: Path, root: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """All files, a folder's own where its name comes among its neighbours."""
    here = folder.resolve()
    if here in above:
        raise ValueError(f"{folder} is a link to a folder that contains it")
    for entry in entries(folder, root):
        if entry.is_dir():
            yield from files_in(Path(entry), root, (*above, here))
        else:
            yield entry.path


def entries(folder: Path, root: Path) -> list[os.DirEntry]:
    """What is not hidden, by name."""
    with os.scandir(folder) as scan:
        visible = [entry for entry in scan if not entry.name.startswith(".")]
    for entry in visible:
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{entry.path} is a link that leads out of {root}")
    return sorted(visible, key=lambda entry: entry.name)


def open_image(path: str | os.PathLike) -> Image.Image:
    """A file's image as RGB, as ImageFolder's; but 16-bit gray is scaled where Pillow would clip.

    Raises:
      ValueError: no image, a broken one, or more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):  # Pillow: a warning
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return eight_bits(image).convert("RGB")
    except Exception as error:  # decoders raise anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no image: {reason}") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray as its high byte; other images as they are."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("pixels of more than 16 bits")
    return Image.fromarray((pixels >> 8).astype(np.uint8))
