"""The splits and classes of the image files in a folder."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flax_resnet.errors import InputError
from torch_ref.image_files import SUFFIXES

NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}  # of each split's folder, in any case
PART = re.compile(
    r"(.*[\W\d_])?(train|val|test)(ing|id|idation)?(sets?|data|images?|imgs?|[a-d])?([\W\d_].*)?"
)
FOLD = re.compile(r"(fold|split|part|partition)[\W_]*\d+")
NOT_OURS = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found"}

Listing = dict[str, list[str]]
"""Class -> image paths, both sorted by name."""


def list_splits(root: Path) -> dict[str, Listing]:
    """The data set in a folder.

    In DIR, or in the one folder in it, lie train and one or both of val and test, under any of
    their NAMES, each with one folder of images a class; or in DIR these class folders alone, which
    are "train". Of a held-out split a class may be empty.

    Raises:
      InputError: another layout, one class only, a class without training images, splits of
        different classes, a link out of DIR.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no folder")
    splits = {k: _list_classes(folder, root) for k, folder in _split_folders(root).items()}
    for split in splits:
        _check_classes(root, split, splits)
    return splits


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder, "train" first."""
    found = _without_wrapper(_folders_in(root, root), root)
    if not any(map(_split_of, found)):
        return {"train": root}
    splits = {_split_of(path): path for path in found}
    if "train" not in splits or None in splits or len(splits) < len(found):
        raise InputError(
            f"{root} has the folders {', '.join(path.name for path in found)} instead of train and"
            " one or both of val and test, or of class folders alone"
        )
    return {split: splits[split] for split in NAMES if split in splits}


def _without_wrapper(found: list[Path], root: Path) -> list[Path]:
    """The folders found, or those in the only one where they are splits."""
    if len(found) != 1 or _split_of(found[0]):
        return found
    inside = _folders_in(found[0], root)
    return inside if any(map(_split_of, inside)) else found


def _split_of(folder: Path) -> str | None:
    return next((k for k, names in NAMES.items() if folder.name.lower() in names), None)


def _list_classes(folder: Path, root: Path) -> Listing:
    """Names of classes are in one form of Unicode."""
    folders = _folders_in(folder, root)
    _check_no_splits(folder, root, folders)
    classes = {unicodedata.normalize("NFC", path.name): path for path in folders}
    if len(classes) < len(folders):
        raise InputError(f"{folder}: two folders have names that look alike")
    return {name: _images_in(path, root) for name, path in sorted(classes.items())}


def _check_no_splits(folder: Path, root: Path, folders: list[Path]) -> None:
    """Raises InputError for folders that would be classes but look like splits or folds."""
    names = [path.name.lower() for path in folders]
    parts = {match[2] for match in map(PART.fullmatch, names) if match}
    folds = len(names) > 1 and all(map(FOLD.fullmatch, names))
    if folds or {"train"} < parts or _hold_the_same(folders, root):
        found = ", ".join(path.name for path in folders)
        raise InputError(f"{folder}: {found} look like splits or folds, not classes")


def _hold_the_same(folders: list[Path], root: Path) -> bool:
    """True if they have no images of their own, and several have folders of one name."""
    inside = [_entries(folder, root) for folder in folders]
    if any(entry.name.lower().endswith(SUFFIXES) for found in inside for entry in found):
        return False
    names = Counter(entry.name for found in inside for entry in found if entry.is_dir())
    return any(count > 1 for count in names.values())


def _check_classes(root: Path, split: str, splits: dict[str, Listing]) -> None:
    classes, expected = splits[split], splits["train"]
    if len(classes) < 2 and split == "train":
        raise InputError(f"{root} needs a folder of images for each of two classes or more")
    if different := sorted(classes.keys() ^ expected.keys()):
        where = "this split alone" if different[0] in classes else "the training split alone"
        raise InputError(f"{root}, {split}: the class {different[0]!r} is in {where}")
    empty = [name for name, files in classes.items() if not files]
    if empty and (split == "train" or len(empty) == len(classes)):
        raise InputError(f"{root}, {split}: the class {empty[0]!r} has no images")


def _folders_in(folder: Path, root: Path) -> list[Path]:
    return [Path(entry) for entry in _entries(folder, root) if entry.is_dir()]


def _images_in(class_folder: Path, root: Path) -> list[str]:
    images = [file for file in _files(class_folder, root) if file.lower().endswith(SUFFIXES)]
    for path in images:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise InputError(f"{path} is no image: no regular file")
    return images


def _files(folder: Path, root: Path, above: tuple[Path, ...] = ()) -> Iterator[str]:
    """All files below a folder, in the order of names at every level."""
    here = Path(os.path.realpath(folder))
    if here in above:
        raise InputError(f"{folder} is a link to a folder that contains it")
    for entry in _entries(folder, root):
        if entry.is_dir():
            yield from _files(Path(entry), root, (*above, here))
        else:
            yield entry.path


def _entries(folder: Path, root: Path) -> list[os.DirEntry]:
    """Visible entries of a folder, sorted by name."""
    with os.scandir(folder) as scan:
        visible = [entry for entry in scan if not entry.name.startswith(".")]
    visible = [entry for entry in visible if entry.name.lower() not in NOT_OURS]
    for entry in filter(os.DirEntry.is_symlink, visible):
        target = os.path.realpath(entry)
        if os.path.islink(target):
            raise InputError(f"{entry.path} is a link to itself")
        if not Path(target).is_relative_to(os.path.realpath(root)):
            raise InputError(f"{entry.path} is a link that leads out of {root}")
    return sorted(visible, key=lambda entry: entry.name)
