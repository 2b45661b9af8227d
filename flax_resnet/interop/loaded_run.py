"""Loads a run for use: its network, weights, preprocessing and class names."""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from unicodedata import normalize

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resnet.config import TrainConfig
from flax_resnet.data.image_files import BadImage, refusal
from flax_resnet.data.pipeline import ahead, decoded, whole
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.shared import Names
from flax_resnet.data.sources import FolderSource
from flax_resnet.errors import InputError, check_type
from flax_resnet.models.folding import fold_batchnorm
from flax_resnet.models.resnet import Identity
from flax_resnet.text import printable
from flax_resnet.training import steps
from flax_resnet.training.evaluation import make_predict
from flax_resnet.training.guard import NonFiniteLoss
from flax_resnet.training.network import Network, Preprocess, Variables, predict_logits
from flax_resnet.training.restore import chosen_step, restore


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained network with everything that is needed to use it."""

    config: TrainConfig
    """All settings of the run."""

    class_names: tuple[str, ...]
    """Names of the classes in the order of the logits."""

    channels: int
    """Number of channels of the images, 1 or 3."""

    network: Network
    """Structure of the network, without its weights."""

    variables: Variables
    """Weights and BatchNorm statistics of the best epoch; those of the last one if no epoch was
    marked as the best, or if `restore_best` is off."""

    contents: dict = dataclasses.field(default_factory=dict)
    """Facts about the training data (`data.prepare.contents`), or {} if they are unknown."""

    @property
    def preprocess(self) -> Preprocess:
        """Normalisation with the channel statistics of the training split."""
        return Preprocess(self.config.data.mean, self.config.data.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of an input image."""
        size = self.config.data.image_size
        return size, size, self.channels

    @property
    def model(self) -> nnx.Module:
        """The network with the run's weights, in evaluation mode. Every access makes a new copy."""
        return self.network.to_model(self.variables)

    def predict(self, images: np.ndarray | Sequence[Path | str] | Path | str) -> np.ndarray:
        """Return the probabilities of the classes, `[B, K]`, in the order of `class_names`.

        Args:
          images: uint8 `[B, H, W, C]`, of the size and channels that `image_shape` says, or paths
            of image files. Files are resized and cropped as in the run's evaluations.

        Raises:
          InputError: the images have another type or shape, or a file is not a readable image.
          NonFiniteLoss: the probabilities are not finite.

        Examples:
          >>> run = flax_resnet.load_run("runs/digits")
          >>> run.predict(["seven.png"]).shape
          (1, 10)
        """
        if isinstance(images, str | os.PathLike):
            images = [images]
        if isinstance(images, Sequence):
            for image in images:
                check_type("images", image, (str, os.PathLike), "one array, or a list of paths")
            rows = [row for _, row in predict_files(self, images, skip_bad=True)]
            if bad := [row for row in rows if isinstance(row, BadImage)]:
                raise refusal(bad)
            return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)
        found = self._in_batches(self._probabilities, images)
        bad = np.flatnonzero(~np.isfinite(found).all(-1))
        if len(bad):
            raise NonFiniteLoss(f"the run gives no finite probabilities for image {bad[0]}")
        return found

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the features, which are the input of the last layer, `[B, D]`.

        Args:
          images: uint8 `[B, H, W, C]`, of the size and channels that `image_shape` says.

        Raises:
          InputError: the images have another type or shape.

        Examples:
          >>> run = flax_resnet.load_run("runs/digits")
          >>> run.features(np.zeros((2, *run.image_shape), np.uint8)).shape
          (2, 64)
        """
        return self._in_batches(self._features, images)

    def _in_batches(self, function, images) -> np.ndarray:
        """Call a function on batches of one size, so that it is compiled once."""
        self._check(images)
        size = min(self.config.eval_batch_size, max(len(images), 1))
        missing = -len(images) % size if len(images) else 1
        whole = np.concatenate([images, np.zeros((missing, *self.image_shape), np.uint8)])
        parts = [function(whole[start : start + size]) for start in range(0, len(whole), size)]
        return np.concatenate(parts)[: len(images)]

    @functools.cached_property
    def _probabilities(self):
        predict = make_predict(self.network, self.preprocess, self.config.model.kernels)
        return functools.partial(predict, self.variables)

    @functools.cached_property
    def _features(self):
        headless = self.model
        headless.fc = Identity()
        network = Network(headless)
        forward = jax.jit(functools.partial(predict_logits, network, self.preprocess))
        return functools.partial(forward, network.initial)

    def logits(self, images) -> jax.Array:
        """The logits `[B, K]`, float32 or wider, of uint8 images `[B, H, W, C]` of the run's size.

        Raises:
          InputError: images of another type or shape, which would give wrong logits.
        """
        self._check(images)
        return predict_logits(self.network, self.preprocess, self.variables, images)

    def _check(self, images):
        shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", type(images))
        if dtype != np.uint8 or len(shape) != 4 or tuple(shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, ("B", *self.image_shape)))
            found = ", ".join(map(str, shape))
            raise InputError(
                f"images are uint8 [{expected}], with pixels from 0 to 255: got {dtype} [{found}]"
            )

    def without_batchnorm(self) -> "LoadedRun":
        """The same run with BatchNorm folded into the convolutions."""
        network = Network(fold_batchnorm(self.network.to_model(self.variables)))
        return dataclasses.replace(self, network=network, variables=network.initial)


def load_run(run_dir: Path | str) -> LoadedRun:
    """Load the run in a directory. It reads nothing outside the directory.

    Raises:
      InputError: the directory holds no run, or none of its checkpoints is complete and unchanged.

    Examples:
      >>> flax_resnet.load_run("runs/digits").class_names[:3]
      ('0', '1', '2')
    """
    check_type("run_dir", run_dir, (str, os.PathLike), "a path")
    document, config, network, state = restore(run_dir, chosen_step)
    variables = jax.tree.map(jnp.asarray, steps.evaluation_variables(state))
    # Earlier versions wrote names in the disk's Unicode form.
    class_names = tuple(normalize("NFC", name) for name in document["class_names"])
    channels = document["channels"]
    contents = document.get("contents", {})
    return LoadedRun(config, class_names, channels, network, variables, contents)


def predict_files(
    run: LoadedRun, paths: Iterable[Path | str], *, skip_bad: bool = False
) -> Iterator[tuple[Path | str, np.ndarray | BadImage]]:
    """Yield (path, probabilities `[K]`) for image files, in their order.

    Threads decode a few batches ahead of the network, which computes a batch while the caller uses
    the one before.

    Args:
      skip_bad: whether an unreadable image gives (path, error) instead of raising.

    Raises:
      InputError: `paths` is a single path, or images are unreadable; they are named.
      NonFiniteLoss: probabilities are not finite.
    """
    if isinstance(paths, str | os.PathLike):
        raise InputError(f"predict_files takes a list of paths, got the path {printable(paths)}")
    paths, data = list(paths), run.config.data
    names = Names.of(map(str, paths))
    source = FolderSource(names, np.zeros(len(paths)), run.channels, data.exif_transpose)
    size = min(run.config.eval_batch_size, max(len(paths), 1))
    parts = [range(len(paths))[start : start + size] for start in range(0, len(paths), size)]
    decode = functools.partial(decoded, source, evaluation_decoder(data))
    images = ahead(decode, parts) if skip_bad else whole(ahead(decode, parts), source)
    for indices, part, probabilities in _computed(run, parts, images, size):
        for index, image, row in zip(indices, part, np.asarray(probabilities), strict=False):
            if not np.isfinite(row).all():
                raise NonFiniteLoss(f"the run gives no finite probabilities for {paths[index]}")
            yield paths[index], image if isinstance(image, BadImage) else row


def _computed(run: LoadedRun, parts: Sequence, images: Iterable[list], size: int) -> Iterator:
    """Yields each part, its images and their probabilities `[size, K]`, which may still be being
    computed: the next batch is on its way by then."""
    waiting = collections.deque()
    for indices, part in zip(parts, images, strict=True):
        batch = np.zeros((size, *run.image_shape), np.uint8)
        for row, image in enumerate(part):
            batch[row] = 0 if isinstance(image, BadImage) else image
        waiting.append((indices, part, run._probabilities(batch)))
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
