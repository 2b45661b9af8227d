"""A finished run, taken up again: its network, weights, preprocessing and class names."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.config import InputError, TrainConfig, from_dict
from flax_resnet.data.image_files import BadImage
from flax_resnet.data.pipeline import ahead, decoded, whole
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.shared import Names
from flax_resnet.data.sources import FolderSource
from flax_resnet.interop import convert, weights
from flax_resnet.models import create_from_config
from flax_resnet.models.folding import fold_batchnorm
from flax_resnet.runs import environment
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.views import config_faults, own_config, warn
from flax_resnet.text import printable
from flax_resnet.training import steps
from flax_resnet.training.evaluation import make_predict
from flax_resnet.training.progress import NonFiniteLoss


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What evaluate, predict and convert work on."""

    config: TrainConfig
    """As it was resolved for the run."""

    class_names: tuple[str, ...]
    """In the order of the logits."""

    channels: int
    """Of the images: 1 or 3."""

    network: steps.Network
    """The model's graph."""

    variables: steps.Variables
    """The best weights, or the last where there is no best or the run was not to restore it."""

    contents: dict = dataclasses.field(default_factory=dict)
    """Of the data that it was trained on (`data.prepare.contents`); empty: not known."""

    @property
    def preprocess(self) -> steps.Preprocess:
        """Channel statistics of the training split."""
        return steps.Preprocess(self.config.data.mean, self.config.data.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the network's input."""
        size = self.config.data.image_size
        return size, size, self.channels

    def logits(self, images) -> jax.Array:
        """uint8 `[B, H, W, C]`, of the run's size and channels -> `[B, K]`, float32 or wider.

        Raises:
          InputError: images of another type or shape: the network would take them for others.
        """
        shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", type(images))
        if dtype != np.uint8 or len(shape) != 4 or tuple(shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, ("B", *self.image_shape)))
            found = ", ".join(map(str, shape))
            raise InputError(
                f"images are uint8 [{expected}], with pixels from 0 to 255: got {dtype} [{found}]"
            )
        return steps.predict_logits(self.network, self.preprocess, self.variables, images)

    def without_batchnorm(self) -> "LoadedRun":
        """The same run with BatchNorm folded into the convolutions."""
        network = steps.Network(fold_batchnorm(self.network.to_model(self.variables)))
        return dataclasses.replace(self, network=network, variables=network.initial)


def load_run(run_dir: Path | str) -> LoadedRun:
    """Read a run directory; everything comes from it alone.

    Raises:
      InputError: there is no run, or none of its checkpoints is sound.
    """
    document, config, network, state = restore(run_dir, _of_the_weights_that_count)
    variables = jax.tree.map(jnp.asarray, steps.evaluation_variables(state))
    class_names, channels = tuple(document["class_names"]), document["channels"]
    contents = document.get("contents", {})
    return LoadedRun(config, class_names, channels, network, variables, contents)


def _of_the_weights_that_count(checkpoints: Checkpoints) -> int | None:
    latest = checkpoints.latest()
    if latest is None:
        return None
    config = from_dict(checkpoints.document(latest)["config"])
    return checkpoints.best() if config.early_stopping.restore_best else latest


def restore(
    run_dir: Path | str, choose: Callable[[Checkpoints], int | None]
) -> tuple[dict, TrainConfig, steps.Network, steps.TrainState]:
    """The checkpoint of a run that `choose` names: document, config, network and state.

    Raises:
      InputError: as `load_run`.
    """
    run_dir = Path(run_dir)
    if not steps_in(run_dir / "checkpoints"):
        own_config(run_dir / "config.json")  # says what is missing where this is no run directory
        raise InputError(f"{run_dir} has no checkpoint yet")
    checkpoints = Checkpoints(run_dir / "checkpoints", say=warn)
    try:
        step = choose(checkpoints)
        if step is None:
            raise InputError(f"{run_dir}: none of its checkpoints is sound")
        for fault in config_faults(run_dir, checkpoints.document(checkpoints.latest())):
            warn(fault)
        document = checkpoints.document(step)
        config = from_dict(document["config"])
        environment.configure_jax(config)
        network = steps.Network(
            create_from_config(config.model, in_channels=document["channels"]),
            freeze_backbone=config.freeze_backbone,
        )
        like = jax.eval_shape(lambda: steps.make_state(network.initial, config))
        return document, config, network, checkpoints.restore(step, like)
    finally:
        checkpoints.close()


def load_weights(
    path: Path | str,
    key: str | None = None,
    *,
    ema: bool = False,
    class_names: Sequence[str] = (),
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, np.ndarray]:
    """Weights of a run directory or a file, under torchvision's names and in torch's layouts.

    Args:
      key, ema: which of the networks in a file, as `names.choose` takes them.
      class_names: in whose order the head is wanted, of a run with the same classes in another.
      say: is told in a line what was taken, where there is anything to tell.

    Raises:
      InputError: there are none, or they are damaged.
    """
    path = Path(path)
    if path.is_dir():
        if key is not None or ema:
            raise InputError(f"{path} is a run, which has one network: no --weights-key, no --ema")
        with _kept_settings():
            run = load_run(path)
            arrays = convert.state_dict(run.network.to_model(run.variables))
        if tuple(class_names) == run.class_names or sorted(class_names) != sorted(run.class_names):
            return arrays
        say(f"{path}: the same classes in another order, matched by name")
        order = [run.class_names.index(name) for name in class_names]
        return arrays | {name: arrays[name][order] for name in ("fc.weight", "fc.bias")}
    arrays, said = weights.load(path, key, ema=ema)
    if said:
        say(said)
    return arrays


@contextlib.contextmanager
def _kept_settings():
    """Reading a run sets JAX as the run had it; who only wants its weights has settings of own."""
    names = ("jax_enable_x64", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


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
    predict = make_predict(run.network, run.preprocess)
    for indices, part in zip(parts, images, strict=True):
        batch = np.zeros((size, *run.image_shape), np.uint8)
        for row, image in enumerate(part):
            batch[row] = 0 if isinstance(image, BadImage) else image
        probabilities = np.asarray(predict(run.variables, batch))
        for index, image, row in zip(indices, part, probabilities, strict=False):
            if not np.isfinite(row).all():
                raise NonFiniteLoss(f"the run gives no finite probabilities for {paths[index]}")
            yield paths[index], image if isinstance(image, BadImage) else row
