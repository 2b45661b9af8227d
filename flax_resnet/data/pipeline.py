"""Grain pipelines: the order of the images, decoding, resizing and batches.

Images that fit are decoded once and stay on the device as uint8; an epoch then only sends
indices. Other images are decoded in every epoch, in threads or worker processes, ahead of the step.
A pipeline can start at any step of a run.
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

_THREADS = 16  # decoding threads; Pillow releases the GIL
_AT_ONCE = 256  # images that are decoded into one list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Resizes and crops an image of any size to the network's input, as torchvision does."""

    size: int
    """Pixels a side of the result."""

    resize: int
    """Pixels of the shorter side before the centre crop."""

    random_resized_crop: bool = False
    """True if training takes a crop of random area and aspect ratio instead."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Bounds of that area, as shares of the image."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Bounds of that crop's width / height."""

    interpolation: str = "bilinear"
    """Pillow's filter."""

    def resized_pixels(self, width: int, height: int) -> int:
        """The most pixels that an image of this size has after the resize."""
        short, long = sorted((width, height))
        return max(self.size**2, self.resize * int(self.resize * long / short))

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Convert uint8 `[H, W, C]` to uint8 `[size, size, C]`; a random crop needs `rng`."""
        if self.random_resized_crop and rng is not None:
            area = _random_area(image, rng, self.scale, self.ratio)
            return _resize(area, (self.size, self.size), self.interpolation)
        return _centre_crop(resized(image, self.resize, self.interpolation), self.size)


def resized(image: np.ndarray, side: int, interpolation: str) -> np.ndarray:
    """Resize uint8 `[H, W, C]` so that the shorter side has `side` pixels."""
    short = min(image.shape[:2])
    # torchvision truncates the longer side.
    return _resize(image, [int(side * s / short) for s in image.shape[:2]], interpolation)


def _resize(image, shape, interpolation):
    if image.shape[:2] == tuple(shape):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    method = Image.Resampling[interpolation.upper()]
    resized = np.asarray(picture.resize((shape[1], shape[0]), method))
    return resized.reshape(*shape, image.shape[-1])


def _centre_crop(image, size):
    # round() rounds halves to even, as torchvision does.
    top, left = (round((s - size) / 2.0) for s in image.shape[:2])
    return image[top : top + size, left : left + size]


def _random_area(image, rng, scale, ratio):
    """torchvision's RandomResizedCrop before its resize: ten draws, then the largest crop."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return image[top : top + h, left : left + w]
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


def decoded(
    source, decoder: Decoder, index: int, rng: np.random.Generator | None = None
) -> np.ndarray | BadImage:
    """An image of a source, decoded, or the error if it is unreadable."""
    try:
        with MEMORY.hold(decoder.resized_pixels):
            image = source[index]
            MEMORY.take(*image.shape[1::-1])  # unless decoding a file has taken it
            return decoder(image, rng)
    except BadImage as error:
        return error


def ahead(decode: Callable, parts: Iterable[Iterable]) -> Iterator[list]:
    """Yields `[decode(item) for item in part]` for each part, computed in threads while the caller
    uses the previous part."""
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
    """Yields the parts unchanged up to the first one with a bad image.

    Raises:
      InputError: at the end, with all bad images of the source named.
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
    """Decode the images of a source at `indices`, by default all, to uint8 `[N, size, size, C]`."""
    indices = range(len(source)) if indices is None else indices
    starts = range(0, len(indices), _AT_ONCE)  # a list of all images would double the memory
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
    """Count each value in each channel of uint8 `[N, H, W, C]`; the counts are `[C, 256]`."""
    channels = np.moveaxis(images, -1, 0)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, scaled to [0, 1], from counts `[C, 256]`.

    Raises:
      InputError: a channel is constant, so that normalisation would divide by 0.
    """
    levels = np.arange(256) / 255
    means = [float(n @ levels / n.sum()) for n in counts]
    variances = [n @ (levels - m) ** 2 / n.sum() for n, m in zip(counts, means, strict=True)]
    stds = [math.sqrt(v) for v in variances]
    if min(stds) <= 1e-6:
        raise InputError("a channel of the training images is constant; give `mean` and `std`")
    return tuple(means), tuple(stds)


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Number of full batches in an epoch; the remainder of its permutation is dropped."""
    return num_images // batch_size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BatchOrder:
    """Random access to the image indices of every step of a run.

    Each epoch is a new permutation without its remainder, drawn at once: Grain's own shuffle takes
    tens of microseconds per image, which slows fast steps. Where an image comes more than once into
    a batch, its k-th further copy has the index plus k times the number of images, so that each
    copy has its own random draws.
    """

    num_images: int
    """Images in the training split."""

    batch_size: int
    """Images in a batch, over all devices."""

    seed: int
    """Random seed; the order of an epoch depends on it and the epoch alone."""

    epochs: int
    """Epochs in the run."""

    repeats: int = 1
    """Copies of each image of the permutation, one after the other."""

    labels: np.ndarray | None = None
    """Classes of the images, for draws with replacement in which classes are equally frequent."""

    rows: slice = dataclasses.field(default_factory=lambda: slice(None))
    """Rows of each batch that this process reads; all processes draw the same permutation."""

    def __len__(self) -> int:
        return self.epochs * steps_per_epoch(self.num_images, self.batch_size)

    def __getitem__(self, step) -> np.ndarray:
        """The indices of a step, int32 `[batch_size]`, or this process's rows of them."""
        epoch, step = divmod(int(step), steps_per_epoch(self.num_images, self.batch_size))
        start = step * self.batch_size
        places = np.arange(start, start + self.batch_size)
        if self.repeats > 1:
            # A batch over `repeats` devices of RASampler, the devices' shares one after the other.
            places = np.concatenate([places[k :: self.repeats] for k in range(self.repeats)])
        whole = _epoch(self, epoch)[places // self.repeats]
        if self.repeats > 1 or self.labels is not None:
            whole = whole + self.num_images * _copies_before(whole)
        return whole[self.rows]


@functools.lru_cache(maxsize=4)
def _epoch(order, epoch):
    """The images of an epoch in their order, int32."""
    rng = np.random.default_rng([order.seed, epoch])
    if order.labels is None:
        return rng.permutation(order.num_images).astype(np.int32)
    shares = 1 / np.bincount(order.labels)[order.labels]
    drawn = rng.choice(order.num_images, order.num_images, p=shares / shares.sum())
    return drawn.astype(np.int32)


def _copies_before(indices: np.ndarray) -> np.ndarray:
    """The number of equal indices before each index."""
    order = np.argsort(indices, kind="stable")
    ranked = indices[order]
    copies = np.empty_like(indices)
    copies[order] = np.arange(len(indices)) - np.searchsorted(ranked, ranked)
    return copies


def index_iterator(order: BatchOrder, *, start: int = 0):
    """An iterator over the index batches from step `start` on; it needs no threads."""
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(grain.MapDataset.source(order)[start:].to_iter_dataset(options))


def image_iterator(source, decoder: Decoder, order: BatchOrder, *, num_workers: int, start=0):
    """An iterator over batches {"image", "label", "index"} from step `start` on, decoded ahead.

    The images of a step depend on its number alone, not on where a run was cut off or on the number
    of workers and processes.
    """
    batches = _DecodedBatches(source, decoder, order)
    if num_workers:
        make = functools.partial(_every_nth, batches, start, num_workers)
        return workers.InTurn(make, num_workers)
    return _decoded_ahead(batches, slice(start, None))


def _every_nth(batches, start, count, number):
    """The batches of a worker process, one of `count`."""
    MEMORY.share(count)
    return _decoded_ahead(batches, slice(start + number, None, count))


def _decoded_ahead(batches, which: slice):
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    return iter(grain.MapDataset.source(batches)[which].to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _DecodedBatches:
    """Random access to the batches of a run; random draws depend on step and image alone."""

    source: Any
    decoder: Decoder
    order: BatchOrder

    def __len__(self):
        return len(self.order)

    def __getitem__(self, step):
        indices = self.order[step]
        images = [self._decode(int(step), int(index)) for index in indices]
        [images] = whole([images], self.source)
        labels = self.source.labels[indices % len(self.source)]
        return {"image": np.stack(images), "label": labels.astype(np.int32), "index": indices}

    def _decode(self, step, index):
        rng = np.random.default_rng([self.order.seed, step, index])
        return decoded(self.source, self.decoder, index % len(self.source), rng)


def evaluation_batches(
    source,
    decoder: Decoder,
    batch_size: int,
    images: np.ndarray | None = None,
    rows: slice = slice(None),  # noqa: B008
    left_out: list[BadImage] | None = None,
):
    """Yield every image once, in order; the last batch is padded with zeros and masked.

    Args:
      images: the decoded source, uint8 `[N, H, W, C]`, if there is one.
      rows: the rows of each batch that this process reads.
      left_out: list that takes the errors of unreadable images, which are then masked.

    Yields:
      {"index", "image", "label", "mask"} with leading axis `batch_size`, or this process's part of
      it; "index" counts the images of the source.

    Raises:
      InputError: images cannot be read, and `left_out` is None.
    """

    def shares():
        """Yields this process's indices of each batch, and those of them that are in the source."""
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
            part = _with_blanks(part, mask)
        if not len(part):  # this process has no image of the last batch
            part = decode_all(source, decoder, own)
        fill = len(indices) - len(own)
        yield {
            "index": np.asarray(indices, np.int32),
            "image": np.pad(np.asarray(part), ((0, fill), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(source.labels[own.start : own.stop].astype(np.int32), (0, fill)),
            "mask": np.pad(mask, (0, fill)),
        }


def _with_blanks(part: list, mask: np.ndarray) -> list[np.ndarray]:
    """The images of a list with zeros in place of those outside the mask."""
    blank = np.zeros_like(part[int(mask.argmax())])
    return [image if good else blank for image, good in zip(part, mask, strict=True)]
