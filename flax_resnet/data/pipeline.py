"""Grain pipelines: order, decode and resize, batch, and a position that can be saved.

Images that fit are decoded once and stay on the device as uint8; an epoch then only sends
indices. Others are decoded again every epoch, in threads or worker processes, ahead of the step.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from PIL import Image

from flax_resnet.data import workers
from flax_resnet.data.image_files import MEMORY, BadImage, refusal
from flax_resnet.errors import InputError

_THREADS = 16  # for decoding; Pillow lets go of the GIL
_AT_ONCE = 256  # images in a list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """From an image of any size to what the network sees, with torchvision's definitions."""

    size: int
    """Pixels a side of the result."""

    resize: int
    """Pixels of the shorter side before the centre crop."""

    random_resized_crop: bool = False
    """A random area and aspect ratio instead (training)."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 `[H, W, C]` -> uint8 `[size, size, C]`."""
        if self.random_resized_crop and rng is not None:
            return _resize(_random_area(image, rng), (self.size, self.size))
        height, width = image.shape[:2]
        short = min(height, width)
        if short != self.resize:
            # torchvision truncates the longer side.
            scaled = [int(self.resize * side / short) for side in (height, width)]
            image = _resize(image, scaled)
        return _centre_crop(image, self.size)


def _resize(image, shape):
    if image.shape[:2] == tuple(shape):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    return resized.reshape(*shape, image.shape[-1])


def _centre_crop(image, size):
    # round() is banker's, as in torchvision
    top, left = (round((s - size) / 2.0) for s in image.shape[:2])
    return image[top : top + size, left : left + size]


def _random_area(image, rng):
    """torchvision's RandomResizedCrop: ten tries, then the largest centre crop that fits."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return image[top : top + h, left : left + w]
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


def decoded(
    source, decoder: Decoder, index: int, rng: np.random.Generator | None = None
) -> np.ndarray | BadImage:
    """An image of a source as the network sees it, or why there is none."""
    try:
        with MEMORY.hold():
            return decoder(source[index], rng)
    except BadImage as error:
        return error


def ahead(decode: Callable, parts: Iterable[Iterable]) -> Iterator[list]:
    """Yields `[decode(item) for item in part]` of each part, done in threads while the part before
    is in use."""
    pool, waiting = ThreadPoolExecutor(_THREADS), collections.deque()
    try:
        for part in parts:
            waiting.append([pool.submit(decode, item) for item in part])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def whole(parts: Iterable[list], source) -> Iterator[list[np.ndarray]]:
    """The parts of a source as they are, as long as every image is one.

    Raises:
      InputError: not at the first bad image but when all are known, and named.
    """
    bad = []
    for part in parts:
        bad += [image for image in part if isinstance(image, BadImage)]
        if not bad:
            yield part
    if bad:
        hint = "" if source.names is None else "; `on_bad_image` skip leaves such files out"
        raise refusal(bad, hint)


def decode_all(source, decoder: Decoder, indices: Sequence[int] | None = None) -> np.ndarray:
    """The images of a source at `indices`, by default all -> uint8 `[N, size, size, C]`."""
    indices = range(len(source)) if indices is None else indices
    starts = range(0, len(indices), _AT_ONCE)  # a list of all would be as large again
    parts = ahead(
        functools.partial(decoded, source, decoder), (indices[s : s + _AT_ONCE] for s in starts)
    )
    images = None
    for start, part in zip(starts, whole(parts, source), strict=True):
        if images is None:
            images = np.empty((len(indices), *part[0].shape), np.uint8)
        images[start : start + len(part)] = part
    return decoder(source[0])[None][:0] if images is None else images


def count_levels(images: np.ndarray) -> np.ndarray:
    """uint8 `[N, H, W, C]` -> how often each channel has each of its levels, `[C, 256]`."""
    channels = np.moveaxis(images, -1, 0)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`[C, 256]` -> mean and standard deviation per channel, of values in [0, 1].

    Raises:
      InputError: a channel is constant: divided by nothing, its padding would be enormous.
    """
    levels = np.arange(256) / 255
    means = [float(n @ levels / n.sum()) for n in counts]
    variances = [n @ (levels - m) ** 2 / n.sum() for n, m in zip(counts, means, strict=True)]
    stds = [math.sqrt(v) for v in variances]
    if min(stds) <= 1e-6:
        raise InputError("a channel of the training images is constant; give mean and std")
    return tuple(means), tuple(stds)


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most `count` indices of a source too large to look at whole."""
    return np.linspace(0, length - 1, min(length, count)).astype(int)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in an epoch; the remainder of each epoch's permutation is dropped."""
    return num_images // batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """Random access to the indices of every step of a run.

    Each epoch is a new permutation without its remainder, drawn at once: Grain's own shuffle
    takes tens of microseconds an image, which shows beside a fast step.
    """

    num_images: int
    """In the training split."""

    batch_size: int
    """Over all devices."""

    seed: int
    """The order depends on this and the epoch alone."""

    epochs: int
    """In the run."""

    rows: slice = dataclasses.field(default_factory=lambda: slice(None))
    """Of each batch, those that this process reads; all have the same permutation."""

    def __len__(self) -> int:
        return self.epochs * steps_per_epoch(self.num_images, self.batch_size)

    def __getitem__(self, step) -> np.ndarray:
        """Step number -> int32 `[batch_size]`, or this process's part."""
        epoch, step = divmod(int(step), steps_per_epoch(self.num_images, self.batch_size))
        start = step * self.batch_size
        whole = _permutation(self.num_images, self.seed, epoch)[start : start + self.batch_size]
        return whole[self.rows]


@functools.lru_cache(maxsize=4)
def _permutation(length, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(length).astype(np.int32)


def index_iterator(order: BatchOrder, *, start: int = 0):
    """The batches from step `start` on; no threads: there is nothing to wait for."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(order)[start:].to_iter_dataset(options))


def image_iterator(source, decoder: Decoder, order: BatchOrder, *, num_workers: int, start=0):
    """{"image", "label", "index"} from step `start` on, decoded ahead of their user.

    A step's images depend on its number alone: not on where the run was cut off, nor on how many
    workers or processes there are.
    """
    batches = _DecodedBatches(source, decoder, order)
    if num_workers:
        make = functools.partial(_every_nth, batches, start, num_workers)
        return workers.InTurn(make, num_workers)
    return _decoded_ahead(batches, slice(start, None))


def _every_nth(batches, start, count, number):
    return _decoded_ahead(batches, slice(start + number, None, count))


def _decoded_ahead(batches, which: slice):
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    return iter(grain.MapDataset.source(batches)[which].to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _DecodedBatches:
    """Random access to the batches of a run; draws belong to the step and the image."""

    source: Any
    decoder: Decoder
    order: BatchOrder

    def __len__(self):
        return len(self.order)

    def __getitem__(self, step):
        indices = self.order[step]
        images = [self._decode(int(step), int(index)) for index in indices]
        [images] = whole([images], self.source)
        labels = self.source.labels[indices]
        return {"image": np.stack(images), "label": labels.astype(np.int32), "index": indices}

    def _decode(self, step, index):
        rng = np.random.default_rng([self.order.seed, step, index])
        return decoded(self.source, self.decoder, index, rng)


def evaluation_batches(
    source,
    decoder: Decoder,
    batch_size: int,
    images: np.ndarray | None = None,
    rows: slice = slice(None),  # noqa: B008
    left_out: list[BadImage] | None = None,
):
    """Every image once, in order; the last batch is filled up with zeros and masked.

    Args:
      images: the decoded source, uint8 `[N, H, W, C]`, where it is at hand.
      rows: of each batch, those that this process reads.
      left_out: takes the images that cannot be read, which are masked then.

    Yields:
      {"image", "label", "mask"} with leading axis `batch_size`, or this process's part of it.

    Raises:
      InputError: images cannot be read, and `left_out` is None.
    """

    def shares():
        """Of each batch the indices that this process reads, and those that there are."""
        for start in range(0, len(source), batch_size):
            indices = range(start, start + batch_size)[rows]
            yield indices, indices[: max(len(source) - indices.start, 0)]

    if images is not None:
        parts = (images[own.start : own.stop] for _, own in shares())
    else:
        parts = ahead(functools.partial(decoded, source, decoder), (own for _, own in shares()))
        parts = whole(parts, source) if left_out is None else parts
    for (indices, own), part in zip(shares(), parts, strict=True):
        mask = np.array([isinstance(image, np.ndarray) for image in part], bool)
        if left_out is not None:
            left_out += [image for image in part if isinstance(image, BadImage)]
            if not mask.any():
                continue
            blank = np.zeros_like(part[int(mask.argmax())])
            part = [image if good else blank for image, good in zip(part, mask, strict=True)]
        if not len(part):  # this process has none of the last batch
            part = decode_all(source, decoder, own)
        fill = len(indices) - len(own)
        yield {
            "image": np.pad(np.asarray(part), ((0, fill), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(source.labels[own.start : own.stop].astype(np.int32), (0, fill)),
            "mask": np.pad(mask, (0, fill)),
        }
