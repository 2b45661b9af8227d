"""A finished run, taken up again: its network, weights, preprocessing and class names."""

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
from flax_resnet.data.image_files import BadImage
from flax_resnet.data.pipeline import ahead, decoded, whole
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.shared import Names
from flax_resnet.data.sources import FolderSource
from flax_resnet.errors import InputError
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
    """What evaluate, predict and convert work on."""

    config: TrainConfig
    """As it was resolved for the run."""

    class_names: tuple[str, ...]
    """In the order of the logits."""

    channels: int
    """Of the images: 1 or 3."""

    network: Network
    """The model's graph."""

    variables: Variables
    """The best weights, or the last where there is no best or the run was not to restore it."""

    contents: dict = dataclasses.field(default_factory=dict)
    """Of the data that it was trained on (`data.prepare.contents`); empty: not known."""

    @property
    def preprocess(self) -> Preprocess:
        """Channel statistics of the training split."""
        return Preprocess(self.config.data.mean, self.config.data.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the network's input."""
        size = self.config.data.image_size
        return size, size, self.channels

    @property
    def model(self) -> nnx.Module:
        """The network with the run's weights, in evaluation mode; a new copy at every access."""
        return self.network.to_model(self.variables)

    def predict(self, images: np.ndarray | Sequence[Path | str] | Path | str) -> np.ndarray:
        """Probabilities of the classes, `[B, K]`, in the order of `class_names`.

        Args:
          images: uint8 `[B, H, W, C]` of the run's size and channels, or paths of image files,
            which are resized and cropped as in the run's evaluations.

        Raises:
          InputError: images of another type or shape, or files that are no readable images.
          NonFiniteLoss: the run's numbers overflow.

        Example:
          >>> run = flax_resnet.load_run("runs/digits")
          >>> run.predict(["seven.png"]).shape
          (1, 10)
        """
        if isinstance(images, str | os.PathLike):
            images = [images]
        if isinstance(images, Sequence):
            rows = [row for _, row in predict_files(self, images)]
            return np.stack(rows) if rows else np.zeros((0, len(self.class_names)), np.float32)
        return self._in_batches(self._probabilities, images)

    def features(self, images: np.ndarray) -> np.ndarray:
        """What goes into the last layer, `[B, D]`; `images` as `predict` takes arrays.

        Raises:
          InputError: images of another type or shape.

        Example:
          >>> run = flax_resnet.load_run("runs/digits")
          >>> run.features(np.zeros((2, *run.image_shape), np.uint8)).shape
          (2, 64)
        """
        return self._in_batches(self._features, images)

    def _in_batches(self, function, images) -> np.ndarray:
        """Call a function on batches of one size, which it is compiled for once."""
        self._check(images)
        size = min(self.config.eval_batch_size, max(len(images), 1))
        missing = -len(images) % size if len(images) else 1
        whole = np.concatenate([images, np.zeros((missing, *self.image_shape), np.uint8)])
        parts = [function(whole[start : start + size]) for start in range(0, len(whole), size)]
        return np.concatenate(parts)[: len(images)]

    @functools.cached_property
    def _probabilities(self):
        return functools.partial(make_predict(self.network, self.preprocess), self.variables)

    @functools.cached_property
    def _features(self):
        headless = self.model
        headless.fc = Identity()
        network = Network(headless)
        forward = jax.jit(functools.partial(predict_logits, network, self.preprocess))
        return functools.partial(forward, network.initial)

    def logits(self, images) -> jax.Array:
        """uint8 `[B, H, W, C]`, of the run's size and channels -> `[B, K]`, float32 or wider.

        Raises:
          InputError: images of another type or shape: the network would take them for others.
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
    """Read a run directory; everything comes from it alone.

    Raises:
      InputError: there is no run, or none of its checkpoints is sound.

    Example:
      >>> flax_resnet.load_run("runs/digits").class_names[:3]
      ('0', '1', '2')
    """
    document, config, network, state = restore(run_dir, chosen_step)
    variables = jax.tree.map(jnp.asarray, steps.evaluation_variables(state))
    # Earlier versions wrote names as the disk has them.
    class_names = tuple(normalize("NFC", name) for name in document["class_names"])
    channels = document["channels"]
    contents = document.get("contents", {})
    return LoadedRun(config, class_names, channels, network, variables, contents)


def predict_files(
    run: LoadedRun, paths: Iterable[Path | str], *, skip_bad: bool = False
) -> Iterator[tuple[Path | str, np.ndarray | BadImage]]:
    """Image files -> (path, probabilities `[K]`), in order and as they come: decoded in threads
    ahead of the network, a few batches of them in memory.

    Args:
      skip_bad: a file that is no readable image comes as (path, error) and ends nothing.

    Raises:
      InputError: `paths` is a single one, or files are no readable images; they are named.
      NonFiniteLoss: the run's numbers overflow, or are none.
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
    predict = make_predict(run.network, run.preprocess, run.config.model.kernels)
    for indices, part in zip(parts, images, strict=True):
        batch = np.zeros((size, *run.image_shape), np.uint8)
        for row, image in enumerate(part):
            batch[row] = 0 if isinstance(image, BadImage) else image
        probabilities = np.asarray(predict(run.variables, batch))
        for index, image, row in zip(indices, part, probabilities, strict=False):
            if not np.isfinite(row).all():
                raise NonFiniteLoss(f"the run gives no finite probabilities for {paths[index]}")
            yield paths[index], image if isinstance(image, BadImage) else row
