"""Folders of images: which file is of which split and class, and its pixels."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}  # of each split's folder, in any case
PART = re.compile(r"(.*[\W\d_])?(train|val|test)(ing|id|idation)?(set|data)?([\W\d_].*)?")
FOLD = re.compile(r"(fold|split|part|partition)[\W_]*\d+")
NOT_OURS = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found"}
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jpe", ".jfif", ".apng", ".pbm", ".pnm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others may start programs


def list_folder(root: Path) -> tuple[dict[str, list[list[str]]], list[str]]:
    """{split: the image files of each class}, and the names of the classes.

    In DIR, or in the one folder in it, lie train and one or both of val and test, under any of
    their NAMES, each with one folder of images a class; or in DIR these class folders alone, which
    are "train". Of a held-out split a class may be empty.

    Raises:
      ValueError: another layout, one class only, a class without training images, splits of
        different classes, a link out of DIR.
    """
    root = Path(os.path.expanduser(root))  # which leaves the home of nobody as it is
    folders = {split: class_folders(path, root) for split, path in split_folders(root).items()}
    class_names = list(folders["train"])
    if len(class_names) < 2:
        raise ValueError(f"{root} needs a folder of images for each of two classes or more")
    images = {}
    for split, classes in folders.items():
        if different := sorted(classes.keys() ^ set(class_names)):
            where = "this split alone" if different[0] in classes else "the training split alone"
            raise ValueError(f"{root}, {split}: the class {different[0]!r} is in {where}")
        images[split] = [images_in(path, root) for path in classes.values()]
        empty = [name for name, files in zip(classes, images[split], strict=True) if not files]
        if empty and (split == "train" or len(empty) == len(classes)):
            raise ValueError(f"{root}, {split}: the class {empty[0]!r} has no images")
    return images, class_names


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder, "train" first."""
    if not root.is_dir():
        raise ValueError(f"{root} is no folder")
    found = list(subfolders(root, root).values())
    if len(found) == 1 and split_of(found[0]) is None:
        inside = list(subfolders(found[0], root).values())
        found = inside if any(map(split_of, inside)) else found
    if not any(map(split_of, found)):
        return {"train": root}
    splits = {split_of(path): path for path in found}
    if "train" not in splits or None in splits or len(splits) < len(found):
        raise ValueError(
            f"{root} has the folders {', '.join(path.name for path in found)} instead of train and"
            " one or both of val and test, or of class folders alone"
        )
    return {split: splits[split] for split in NAMES if split in splits}


def split_of(folder: Path) -> str | None:
    return next((k for k, names in NAMES.items() if folder.name.lower() in names), None)


def class_folders(folder: Path, root: Path) -> dict[str, Path]:
    """By name, in one form of Unicode."""
    found = subfolders(folder, root)
    names = [name.lower() for name in found]
    parts = {match[2] for match in map(PART.fullmatch, names) if match}
    folds = len(found) > 1 and all(map(FOLD.fullmatch, names))
    if folds or {"train"} < parts or hold_the_same(list(found.values()), root):
        raise ValueError(f"{folder}: {', '.join(found)} look like splits or folds, not classes")
    classes = {unicodedata.normalize("NFC", name): path for name, path in found.items()}
    if len(classes) < len(found):
        raise ValueError(f"{folder}: two folders have names that look alike")
    return dict(sorted(classes.items()))


def hold_the_same(folders: list[Path], root: Path) -> bool:
    """Whether they have no images of their own, and several have folders of one name."""
    inside = [entries(folder, root) for folder in folders]
    if any(entry.name.lower().endswith(SUFFIXES) for found in inside for entry in found):
        return False
    names = Counter(entry.name for found in inside for entry in found if entry.is_dir())
    return any(count > 1 for count in names.values())


def subfolders(folder: Path, root: Path) -> dict[str, Path]:
    return {entry.name: Path(entry) for entry in entries(folder, root) if entry.is_dir()}


def images_in(class_folder: Path, root: Path) -> list[str]:
    return [file for file in files_in(class_folder, root) if file.lower().endswith(SUFFIXES)]


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
    """What is neither hidden nor a system's, by name."""
    with os.scandir(folder) as scan:
        visible = [entry for entry in scan if not entry.name.startswith(".")]
    visible = [entry for entry in visible if entry.name.lower() not in NOT_OURS]
    for entry in visible:
        if entry.is_symlink() and not Path(entry).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{entry.path} is a link that leads out of {root}")
    return sorted(visible, key=lambda entry: entry.name)


def open_image(path: str | os.PathLike, *, exif_transpose: bool = False) -> Image.Image:
    """A file's image as RGB, as ImageFolder's, or upright by its EXIF orientation; but gray of more
    than 8 bits is scaled by them, where Pillow would clip.

    Raises:
      ValueError: no image, a broken one, samples of unknown depth, or more pixels than
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
        raise ValueError(f"{path} is no image: {reason}") from error


class Depth:
    """How many bits an image's samples have, by its header."""

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
        """The bits that samples seem to have."""
        if highest == 0 or (self.room == 32 and highest < 256):
            return 8
        if highest < 2**14:
            raise ValueError(f"samples with room for {self.room} bits end at {highest}")
        return 16
