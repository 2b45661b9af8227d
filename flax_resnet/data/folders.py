"""Finds the split and the class of every image file in a tree of folders."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from unicodedata import normalize

from flax_resnet.data.image_files import SUFFIXES
from flax_resnet.errors import InputError
from flax_resnet.text import listed, printable

_SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""{name in lower case: its split}, the training split first."""

_LIKE_A_SPLIT = re.compile(
    r"(?:.*[\W\d_])?(train|val|test)(?:ing|id|idation)?(?:sets?|data|images?|imgs?|[a-d])?"
    r"(?:[\W\d_].*)?"
)
_LIKE_A_FOLD = re.compile(r"(?:fold|split|part|partition)[\W_]*\d+")

_OF_THE_SYSTEM = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found"}
"""Folders of thumbnails, resource forks and deleted files, in lower case."""

HIDDEN_FOLDER = "hidden or system folder"
STRAY = "image outside of the class folders"

Listing = dict[str, list[str]]
"""{class: its image paths}, both sorted by name."""

PassedOver = dict[str, str]
"""{path: its suffix, `HIDDEN_FOLDER` or `STRAY`} of files and folders that are no part of the
data."""


def chosen_splits(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{split: its name} for the names of a data set's splits, and the names that are left over. Of
    several names of one split that split's own is taken, else the first."""
    left = sorted(names, key=lambda name: (_SPLITS.get(name.lower()) != name, name))
    found = {_SPLITS.get(name.lower()): name for name in reversed(left)}
    chosen = {split: found[split] for split in dict.fromkeys(_SPLITS.values()) if split in found}
    return chosen, [name for name in left if name not in chosen.values()]


def is_passed_over(name: str) -> bool:
    """True if a file or folder of this name is hidden or made by an operating system."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def list_splits(root: Path) -> tuple[dict[str, Listing], Counter[str]]:
    """List the splits of a data set in one of the layouts of `sources.open_dataset`.

    Returns:
      {split: its listing}, with class names in Unicode's NFC, where only classes of the training
      split need images; and the number of passed-over folders and of files of each other suffix.

    Raises:
      InputError: another layout, fewer than two classes, splits of different classes, a class
        whose name is not UTF-8, a symbolic link that leads out of `root`.
    """
    if not root.is_dir():
        raise InputError(f"folder:{root}: no such folder")
    splits, passed_over = {}, {}
    for split, folder in _split_folders(root, passed_over).items():
        splits[split] = _list_classes(folder, root, passed_over)
        _check_classes(folder, list(splits[split]), list(splits["train"]))
    return splits, Counter(passed_over.values())


def images_below(folder: Path) -> tuple[list[str], Counter[str]]:
    """List the images in a folder and in those below it, sorted, and count what was passed over, as
    `list_splits` does for a class. Here symbolic links may lead anywhere.

    Raises:
      InputError: a symbolic link to a folder that contains it.
    """
    passed_over = {}
    files = _images(folder, Path("/"), passed_over)
    return files, Counter(passed_over.values())


def _split_folders(root: Path, passed_over: PassedOver) -> dict[str, Path]:
    """{split: its folder}, the training split first."""
    top = _without_wrapper(root)
    found = _folders_in(top, root, passed_over)
    meant = {}
    for path in found:
        meant.setdefault(_SPLITS.get(path.name.lower()), []).append(path)
    others = meant.pop(None, [])
    if not meant:
        return {"train": top}
    for split, paths in meant.items():
        if len(paths) > 1:
            raise InputError(
                f"folder:{root}: {_names(paths)} mean the same split, {split}; keep one of them"
            )
    if others or "train" not in meant:
        raise InputError(
            f"folder:{root}: has the folders {_names(found)}; it must have train and one or both of"
            " val (or validation) and test, or class folders only"
        )
    return {split: meant[split][0] for split in _SPLITS.values() if split in meant}


def _without_wrapper(root: Path) -> Path:
    """The folder with the splits: `root`, or the only folder in it."""
    inside = _folders_in(root, root)
    deeper = _folders_in(inside[0], root) if len(inside) == 1 else []
    wraps = inside and inside[0].name.lower() not in _SPLITS
    return inside[0] if wraps and any(p.name.lower() in _SPLITS for p in deeper) else root


def _check_no_splits(folder: Path, root: Path, folders: list[Path]):
    """Raises InputError for folders that would be classes but look like splits or folds."""
    names = [path.name.lower() for path in folders]
    splits = {match[1] for match in map(_LIKE_A_SPLIT.fullmatch, names) if match}
    folds = len(names) > 1 and all(map(_LIKE_A_FOLD.fullmatch, names))
    shared = _shared_folders(root, folders)
    if not ({"train"} < splits or folds or shared):
        return
    seen = (
        f", all without an image of their own, with {listed(shared)} in several" if shared else ""
    )
    raise InputError(
        f"{folder}: has the folders {_names(folders)}{seen}: they look like splits or folds"
        " and not like classes; it must have train and one or both of val and test, or class"
        " folders with images directly in them"
    )


def _shared_folders(root: Path, folders: list[Path]) -> list[str]:
    """Names of subfolders that several of the folders have; none if any folder has images."""
    inside = Counter()
    for folder in folders:
        entries = _entries(folder, root)
        if any(_is_image(entry.name) for entry in entries):
            return []
        inside.update(entry.name for entry in entries if entry.is_dir())
    return sorted(name for name, count in inside.items() if count > 1)


def _names(folders: list[Path]) -> str:
    return listed((folder.name for folder in folders), 10)


def _list_classes(folder: Path, root: Path, passed_over: PassedOver) -> Listing:
    folders, classes = _folders_in(folder, root, passed_over), {}
    _check_no_splits(folder, root, folders)
    for entry in _entries(folder, root):
        if _is_image(entry.name) and not entry.is_dir():
            passed_over[entry.path] = STRAY
    for class_folder in folders:
        name = _class_name(class_folder)
        if name in classes:
            raise InputError(f"{folder}: two folders look alike: {printable(ascii(name))}")
        classes[name] = _images(class_folder, root, passed_over)
    return dict(sorted(classes.items()))


def _class_name(class_folder: Path) -> str:
    try:
        class_folder.name.encode()
    except UnicodeEncodeError:  # config and report could not name the class
        raise InputError(
            f"{str(class_folder)!r}: the name of the class is not UTF-8; rename it"
        ) from None
    return normalize("NFC", class_folder.name)


def _check_classes(folder: Path, classes: list[str], expected: list[str]):
    if len(classes) < 2:
        found = f"only the class folder {printable(classes[0])}" if classes else "no class folder"
        raise InputError(f"{folder}: {found}; it must have a folder of images for each class")
    if classes != expected:
        missing, extra = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
        raise InputError(
            f"{folder}: not the classes of the training split: missing {listed(missing) or '-'}"
            f", extra {listed(extra) or '-'}; each split needs a folder of each class, which may be"
            " empty except in the training split"
        )


def _path(path: str | Path) -> str:
    return printable(path, 1000)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower() or "no suffix"


def _folders_in(folder: Path, root: Path, passed_over: PassedOver | None = None) -> list[Path]:
    """The folders in a folder that are not passed over, sorted by name."""
    entries = _entries(folder, root, passed_over)
    return [Path(entry.path) for entry in entries if entry.is_dir()]


def _images(folder: Path, root: Path, passed_over: PassedOver) -> list[str]:
    """The images in a folder and in those below it, sorted."""
    images = []
    for file in _files(folder, root, passed_over):
        if _is_image(file):
            images.append(file)
        else:
            passed_over[file] = _suffix(file)
    return images


def _files(
    folder: str | Path, root: Path, passed_over: PassedOver, above: tuple[Path, ...] = ()
) -> Iterator[str]:
    here = Path(os.path.realpath(folder))
    if here in above:
        raise InputError(f"{_path(folder)}: symbolic link to a folder that contains it")
    for entry in _entries(folder, root, passed_over):
        if entry.is_dir():
            yield from _files(entry.path, root, passed_over, (*above, here))
        else:
            yield entry.path


def _entries(
    folder: str | Path, root: Path, passed_over: PassedOver | None = None
) -> list[os.DirEntry]:
    entries = []
    with os.scandir(folder) as scan:
        for entry in scan:
            if not is_passed_over(entry.name):
                entries.append(entry)
            elif passed_over is not None and entry.is_dir():
                passed_over[entry.path] = HIDDEN_FOLDER
    for entry in filter(os.DirEntry.is_symlink, entries):
        target = os.path.realpath(entry.path)
        if os.path.islink(target):
            raise InputError(f"{_path(entry.path)}: symbolic link to itself")
        if not Path(target).is_relative_to(os.path.realpath(root)):
            raise InputError(f"{_path(entry.path)}: symbolic link that leads out of {root}")
    return sorted(entries, key=lambda entry: entry.name)
