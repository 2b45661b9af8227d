"""Reading a run back from its checkpoints, and the weights that another training starts from."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from flax_resnet.config import TrainConfig, from_dict
from flax_resnet.errors import InputError
from flax_resnet.models import create_from_config
from flax_resnet.runs import environment
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.views import config_faults, own_config, warn
from flax_resnet.training import steps
from flax_resnet.training.network import Network
from flax_resnet.weights import convert, files


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
        network = Network(
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
            raise InputError(f"{path} is a run, which has one network: no `weights_key`, no `ema`")
        with _kept_settings():
            document, _, network, state = restore(path, chosen_step)
            model = network.to_model(steps.evaluation_variables(state))
            arrays, own_names = convert.state_dict(model), document["class_names"]
        if list(class_names) == own_names or sorted(class_names) != sorted(own_names):
            return arrays
        say(f"{path}: the same classes in another order, matched by name")
        order = [own_names.index(name) for name in class_names]
        return arrays | {name: arrays[name][order] for name in ("fc.weight", "fc.bias")}
    arrays, said = files.load(path, key, ema=ema)
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
