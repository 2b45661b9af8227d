"""Reading a run back from its checkpoints, and the weights that another training starts from."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import jax
import numpy as np

from flax_resnet.config import TrainConfig, from_dict
from flax_resnet.errors import InputError, check_type
from flax_resnet.models import create_from_config
from flax_resnet.runs import environment, views
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.views import config_faults, warn, written_config
from flax_resnet.training import steps
from flax_resnet.training.network import Network
from flax_resnet.weights import convert, files, published


def chosen_step(checkpoints: Checkpoints) -> int | None:
    """The step whose weights are reported and served: the best, or the latest where the run was
    not to restore the best; None where no checkpoint is sound."""
    latest = checkpoints.latest()
    if latest is None:
        return None
    config = from_dict(checkpoints.document(latest)["config"])
    return checkpoints.best() if config.early_stopping.restore_best else latest


def restore(
    run_dir: Path | str, choose: Callable[[Checkpoints], int | None]
) -> tuple[dict, TrainConfig, Network, steps.TrainState]:
    """The checkpoint of a run that `choose` names: document, config, network and state.

    Raises:
      InputError: as `load_run`.
    """
    run_dir = Path(run_dir)
    if not steps_in(run_dir / "checkpoints"):
        written_config(run_dir)  # says what is missing where this is no run
        raise InputError(f"{run_dir} has no checkpoint yet")
    checkpoints = Checkpoints(run_dir / "checkpoints", say=warn)
    try:
        step = choose(checkpoints)
        if step is None:
            raise InputError(f"{run_dir}: none of its checkpoints is sound")
        newest = checkpoints.document(checkpoints.latest())
        for fault in config_faults(run_dir, newest):
            warn(fault)
        document = checkpoints.document(step)
        config = from_dict(newest["config"])  # a resumed run may name another place of its data
        environment.configure_jax(config)
        network = Network(
            create_from_config(config.model, in_channels=document["channels"]),
            freeze_backbone=config.freeze_backbone,
        )
        like = jax.eval_shape(lambda: steps.make_state(network.initial, config))
        return document, config, network, checkpoints.restore(step, like)
    finally:
        checkpoints.close()


class Weights(NamedTuple):
    """The weights of one network, and what is known about them."""

    arrays: dict[str, np.ndarray]
    """{name: array} under torchvision's names and in torch's layouts."""

    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; () if they are unknown."""

    data: dict = {}
    """Fields of `DataConfig` that belong to the weights (mean, std, sizes, interpolation), or {} if
    they are unknown."""

    divided: dict = {}
    """Fields of `DataConfig` that name and divide the data on which a run was trained, or {} for
    weights of a file."""

    @property
    def model(self) -> dict:
        """Fields of `ModelConfig` that belong to the weights, found from names and shapes."""
        kind = convert.nearest_architecture(self.arrays)
        return {"arch": kind.arch, "stem": kind.stem, "shortcut": kind.shortcut}


def pretrained(
    source: Path | str,
    key: str | None = None,
    *,
    ema: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Weights:
    """Return trained weights: published ones by their name, or those of a file or a run directory.

    Args:
      source: a file, a run directory, `torchvision:ARCH[:WEIGHTS]`, `timm:NAME`, `hf:OWNER/REPO` or
        a URL. Downloads are kept in the caches of torch.hub and huggingface_hub.
      key: key or prefix of the network to take, in a file that holds several.
      ema: take the averaged weights, in a file that holds raw ones too.
      say: function that is called with a line about what was taken, if there was a choice.

    Raises:
      InputError: the weights do not exist or are damaged, or the server does not answer.

    Examples:
      >>> weights = flax_resnet.pretrained("runs/digits")  # or "torchvision:resnet50"
      >>> weights.class_names[:3]
      ('0', '1', '2')
    """
    check_type("source", source, (str, os.PathLike), "a path, a name or a URL")
    if published.is_name(str(source)):
        found = published.find(str(source), say)
    elif Path(source).is_dir():
        if key is not None or ema:
            why = "which has one network: no `weights_key`, no `ema`"
            raise InputError(f"{source} is a run, {why}")
        return _of_run(Path(source))
    else:
        found = published.Found(Path(source))
    arrays, said = files.load(found.path, key, ema=ema)
    if said:
        say(said)
    fit = len(found.class_names) == len(arrays.get("fc.bias", ()))
    return Weights(arrays, found.class_names if fit else (), found.data)


_OF_DATA = ("mean", "std", "image_size", "resize_size", "interpolation", "grayscale")


def _of_run(path: Path) -> Weights:
    with _kept_settings():
        document, config, network, state = restore(path, chosen_step)
        arrays = convert.state_dict(network.to_model(steps.evaluation_variables(state)))
    names = tuple(normalize("NFC", name) for name in document["class_names"])
    data = {name: getattr(config.data, name) for name in _OF_DATA}
    return Weights(arrays, names, data, views.divided(document))


def load_weights(
    source: Path | str,
    key: str | None = None,
    *,
    ema: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, np.ndarray]:
    """The arrays of `pretrained`."""
    return pretrained(source, key, ema=ema, say=say).arrays


def in_order(weights: Weights, class_names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays with the head in the order of these names; None if they have it or other names."""
    head = head_in_order(weights.arrays, weights.class_names, class_names)
    return weights.arrays | head if head else None


def head_in_order(
    arrays: dict[str, np.ndarray], own_names: Sequence[str], class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The head, whose classes have their own names, in the order of the same names; {} if it has
    that order or other names."""
    if tuple(class_names) == tuple(own_names) or sorted(class_names) != sorted(own_names):
        return {}
    order = [own_names.index(name) for name in class_names]
    return {name: arrays[name][order] for name in ("fc.weight", "fc.bias") if name in arrays}


@contextlib.contextmanager
def _kept_settings():
    """Restores JAX's settings, which reading a run changes: here only its weights are wanted."""
    names = ("jax_enable_x64", "jax_compilation_cache_dir")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
