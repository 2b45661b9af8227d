"""Write a data set into a few large files (ArrayRecord shards), for --dataset arrayrecord:OUT.

python scripts/shards.py folder:imagenet shards/imagenet
python scripts/shards.py tfds:imagenet2012 shards/imagenet-256 --resize 256

A shard holds the bytes of the image files. With --resize, larger images are written as smaller
JPEGs. The command decodes each image once, so that it writes no broken one.
`sha256sum --check SHA256SUMS`, in the folder OUT, checks the shards.
"""

import contextlib
import functools
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from flax_resnet.commands import cli, output_files
from flax_resnet.config import DataConfig, TrainConfig, idle
from flax_resnet.data import pipeline, shards
from flax_resnet.data.image_files import MEMORY, BadImage, is_turned
from flax_resnet.data.prepare import SPLITS
from flax_resnet.data.sources import ArraySource, Source, open_dataset, places
from flax_resnet.errors import InputError
from flax_resnet.text import say

_AT_ONCE = 256  # images that are encoded ahead
_QUALITY = {"quality": 95, "subsampling": 0}  # of JPEGs: the best that Pillow recommends
_WHOLE = TrainConfig(data=DataConfig(validation_fraction=0.0, test_fraction=0.0))


def main():
    args, data = _parse()
    dataset = open_dataset(data)
    say(*dataset.remarks("they stay as they are"))
    splits = {
        split: (_files(source, args.resize, data.interpolation), source.labels)
        for split in SPLITS
        if len(source := getattr(dataset, split))
    }
    facts = {"class_names": dataset.class_names, "channels": dataset.channels}
    with _new_folder(args.out) as folder:
        for name, count in shards.write(folder, splits, args.images_per_shard, **facts):
            say(f"{name}: {count:,} images")


def _parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("dataset", metavar="DATASET", help="the same as --dataset of train")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for the shards")
    parser.add_argument(
        "--images-per-shard", type=int, default=5000, metavar="INT", help="default: 5000"
    )
    parser.add_argument(
        "--resize", type=int, metavar="INT", help="reduce the shorter side to so many pixels"
    )
    cli.add_config_flags(parser, only=("interpolation", "on_bad_image"))
    args = parser.parse_args()
    for flag in ("images_per_shard", "resize"):
        cli.check_positive(f"--{flag.replace('_', '-')}", getattr(args, flag))
    if os.path.lexists(args.out):
        raise InputError(f"OUT: {args.out} exists")
    output_files.check_outputs({"OUT": args.out}, places(args.dataset))
    if args.interpolation and not args.resize:
        raise InputError("--interpolation has no effect without --resize")
    config = cli.merge(_WHOLE, cli.requested_values(args))
    if faults := idle(config):
        raise InputError("; ".join(faults.values()))
    return args, config.data


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that gets its name when it is complete."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files(source: Source, resize: int | None, interpolation: str) -> Iterator[bytes]:
    """The images of a source as files; InputError, when all were tried, if any is unreadable."""
    starts = range(0, len(source), _AT_ONCE)
    parts = (range(start, min(start + _AT_ONCE, len(source))) for start in starts)
    encode = functools.partial(_encoded, source, resize, interpolation)
    return chain.from_iterable(pipeline.whole(pipeline.ahead(encode, parts), source))


def _encoded(source, resize, interpolation, index: int) -> bytes | BadImage:
    try:
        with MEMORY.hold():
            image = source[index]
            larger = resize is not None and min(image.shape[:2]) > resize
            if larger:
                image = pipeline.resized(image, resize, interpolation)
    except BadImage as error:
        return error
    if isinstance(source, ArraySource):
        return _saved(image, "PNG")
    file = source.file(index)
    if larger:
        return _saved(image, "JPEG", exif=_orientation(file), **_QUALITY)
    return Path(file).read_bytes() if isinstance(file, str) else file.getvalue()


def _saved(image: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, kind, **options)
    return file.getvalue()


def _orientation(file) -> Image.Exif:
    """The EXIF orientation of an image that `exif_transpose` would turn, else no EXIF."""
    exif = Image.Exif()
    if is_turned(file):
        with Image.open(file) as image:
            exif[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
    return exif
