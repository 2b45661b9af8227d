"""Training: `fit` brings devices, data and network together and runs them."""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resnet.config import TrainConfig, check_unvalidated, flat, idle
from flax_resnet.data.prepare import SPLITS, Prepared, fingerprint, prepare
from flax_resnet.data.sources import places, same_place
from flax_resnet.devices import distributed
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError, check_type
from flax_resnet.models import create_from_config
from flax_resnet.models.cnn import SMALLEST
from flax_resnet.models.summary import stage_rows, summary_table
from flax_resnet.runs import environment
from flax_resnet.runs.checkpoint import Checkpoints, check_space, steps_in
from flax_resnet.runs.directory import RunDirectory, SharedDirectory, reserve
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import faults, is_begun, read_config
from flax_resnet.training import sanity, steps
from flax_resnet.training.loop import rescue, train
from flax_resnet.training.network import Network
from flax_resnet.training.progress import SignalFlag
from flax_resnet.training.report import report
from flax_resnet.training.restore import in_order, pretrained
from flax_resnet.training.setup import Callback, set_up
from flax_resnet.weights import convert


def fit(
    config: TrainConfig,
    run_dir: Path | str | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    display: Display | None = None,
    callbacks: Sequence[Callback] = (),
    profile: int = 0,
) -> dict:
    """Train a network, evaluate it and write a run directory.

    If several processes train together, all of them call this function. Only the first one prints
    and writes the tables and the report.

    Args:
      config: the settings. A run that is resumed keeps its own settings, except the devices, the
        workers and, if the data have moved, their place.
      run_dir: a new directory, or the directory of the run to resume or to overwrite. None makes
        the new directory runs/ARCH-DATASET, with a number if that exists.
      resume: continue the run in `run_dir`, or begin it if there is none.
      overwrite: replace the run in `run_dir`.
      command: the command line that called this function, for the report.
      display: prints the progress; None prints to the terminal.
      callbacks: functions that the first process calls as `callback(event, step, values)`. The
        event is "step" with the metrics of a logged step, "epoch" with the row of an epoch, or
        "end" with the report. If one raises an exception, the training ends and its work is saved.
      profile: number of steps to trace for TensorBoard or XProf; 0 traces none.

    Returns:
      The report, as in report.json. In all processes but the first, only its "splits".

    Raises:
      InputError: the input is bad; nothing has been written.
      NonFiniteLoss: a loss is not finite; the message names the step and the last checkpoint.
      Interrupted: SIGTERM, SIGHUP or Ctrl-C has reached the main thread; the work is saved.
      RunLost: the run directory was moved, deleted or replaced.

    Examples:
      >>> config = flax_resnet.TrainConfig(epochs=1, model={"arch": "basic_cnn"})
      >>> report = flax_resnet.fit(config, "runs/short")
      >>> sorted(report["splits"])
      ['test', 'train', 'validation']
    """
    _check_arguments(config, run_dir, callbacks, profile, display)
    display = display or Display(quiet=not distributed.is_first())
    run_dir = None if run_dir is None else Path(run_dir)
    if resume:
        config = _resumed(config, run_dir, display)
    how = {"resume": resume, "overwrite": overwrite}
    engine, prepared, network = _begin_together(config, run_dir, display, how)
    directory = _open_directory(run_dir, config, **how, say=display.say)
    try:
        announce(prepared, engine, network, directory.path, display)
        start = Start(prepared, engine, network, directory, display)
        return run_all([start], directory.path, command, callbacks=callbacks, profile=profile)[0]
    finally:
        display.stop()
        directory.close()


def _check_arguments(config, run_dir, callbacks, profile, display):
    check_type("config", config, TrainConfig, "a TrainConfig")
    check_type("run_dir", run_dir, (str, os.PathLike, type(None)), "a path or None")
    check_type("callbacks", callbacks, Sequence, "a list of functions")
    check_type("profile", profile, int, "a number of steps")
    check_type("display", display, (Display, type(None)), "a Display or None")
    for callback in callbacks:
        if not callable(callback):
            raise InputError(f"`callbacks`: {callback!r} is no function")


def _resumed(config: TrainConfig, run_dir: Path | None, display: Display) -> TrainConfig:
    """The config with which a run goes on; its damaged files are named."""
    if run_dir is None:
        raise InputError("`resume` needs `run_dir`, the directory of the run to continue")
    if not is_begun(run_dir):
        return config
    for fault in faults(run_dir):
        display.say(f"{fault}; it is written anew")
    return as_begun(config, read_config(run_dir, say=lambda line: None))


def _begin_together(
    config: TrainConfig, run_dir: Path | None, display: Display, how: dict
) -> tuple[Engine, Prepared, Network]:
    """`begin` in every process; raises InputError where they disagree on anything."""
    several = jax.process_count() > 1
    if several:
        asked = how | {"run_dir": str(run_dir)}
        distributed.check_agreement(asked | environment.code() | flat(config))
    begun = distributed.run_on_all(lambda: begin(config, run_dir, how["resume"], display))
    if several:
        _, prepared, network = begun
        distributed.check_agreement(fingerprint(prepared) | _weights_digest(network))
    return begun


def announce(prepared: Prepared, engine: Engine, network: Network, run_dir: Path, display: Display):
    """Print what is about to be trained."""
    config, dataset = prepared.config, prepared.dataset
    for line in dataset.remarks():
        display.say(line)
    model, data = config.model, config.data
    sizes = [len(getattr(dataset, split)) for split in SPLITS]
    stages = stage_rows(network.to_model(network.initial), prepared.image_shape)
    display.show(summary_table(model.arch, stages))
    display.say(
        f"{data.dataset}: {sizes[0]:,} training, {sizes[1]:,} validation, {sizes[2]:,} test"
        f" images, {model.num_classes} classes; {model.arch}"
        + (f", stem {model.stem}" if model.stem else "")
        + (f", shortcut {model.shortcut}" if model.shortcut else "")
        + f", images {data.image_size}x{data.image_size}x{dataset.channels}"
    )
    display.warn(sanity.of_training(sizes[0], config.batch_size))
    display.warn(sanity.of_settings(config, dataset.channels, dataset.own_splits))
    display.warn(sanity.of_updates(config, config.epochs * (sizes[0] // config.batch_size)))
    if data.num_workers and "train" in prepared.images:
        display.warn(["`num_workers` has no effect: the training images are cached"])
    device = engine.devices[0]
    display.say(
        f"on {len(engine.devices)} x {device.device_kind}, run {run_dir};"
        f" {environment.products(model, device.platform)}"
    )


class Start(NamedTuple):
    """The parts with which a run begins."""

    prepared: Prepared
    engine: Engine
    network: Network
    directory: RunDirectory
    display: Display


def run_all(starts: Sequence[Start], place: Path, command: str, **options) -> list[dict]:
    """Set up or take up, train together, report; what a failure would lose is saved first.

    Args:
      starts: of runs that differ in their seeds alone.
      place: the directory of the run, or of all.
      options: of `set_up`.
    """
    for start in starts:
        start.directory.write_config(start.prepared.config)
    runs = []
    with contextlib.ExitStack() as closing:
        try:
            for start in starts:
                checkpoints = Checkpoints(start.directory.checkpoints, say=start.display.say)
                closing.callback(checkpoints.close)
                runs.append(set_up(*start, checkpoints, like=runs[0] if runs else None, **options))
                closing.callback(runs[-1].close)
            with SignalFlag(*runs):
                train(*runs)
                return [report(run, command) for run in runs]
        except Exception as error:
            saved = bool(runs) and all([rescue(run, error) for run in runs])
            with contextlib.suppress(AttributeError):  # a few exceptions take no attributes
                error.run_dir, error.saved = place, saved
            for start in starts:
                start.directory.check()  # writing where it is gone fails in many ways
            raise


def as_begun(config: TrainConfig, own: TrainConfig) -> TrainConfig:
    """The config of a run to resume: where and how it runs may change, what it computes may not.
    Data may have moved within their kind: what they are is compared with the checkpoint."""
    data = dataclasses.replace(own.data, num_workers=config.data.num_workers)
    if _kind(config) == _kind(own):
        data = dataclasses.replace(data, dataset=config.data.dataset)
    how = {"parallel": config.parallel, "eval_batch_size": config.eval_batch_size}
    return dataclasses.replace(own, data=data, **how)


def _kind(config: TrainConfig) -> str:
    return config.data.dataset.partition(":")[0]


def begin(
    config: TrainConfig,
    run_dir: Path | None,
    resume: bool,
    display: Display,
    members: int | None = None,
) -> tuple[Engine, Prepared, Network]:
    """Devices, data and network; nothing is written.

    Args:
      members: number of runs that share a program; None: the run is alone.
    """
    _check_apart(run_dir or Path("runs"), config.data.dataset)
    begun = resume and steps_in(run_dir / "checkpoints")
    if not begun and (faults := idle(config)):
        raise InputError("; ".join(faults.values()))
    environment.configure_jax(config)
    engine = Engine(
        config.parallel, deterministic=config.deterministic, kernels=config.model.kernels
    )
    engine.check_batch_size(config.batch_size, config.model.batch_norm_images)
    if members:
        engine.check_members()
    prepared = prepare(config)
    network = initial_network(prepared, engine, begun, display)
    _check_images(network, prepared, engine.axis_name)
    state = jax.eval_shape(lambda: steps.make_state(network.initial, config))
    check_space(run_dir or Path("runs"), [state] * (members or 1), len(begun or ()))
    return engine, prepared, network


def _check_apart(run_dir: Path, dataset: str):
    """Raises InputError for a run among its images: its folder and pictures would be a class."""
    real = Path(os.path.realpath(run_dir))
    for place in places(dataset) if dataset.startswith("folder:") else ():
        if real.is_relative_to(os.path.realpath(place)):
            raise InputError(
                f"{run_dir} lies in {place}, the folder of the images, where it would be a class;"
                " give another `run_dir`"
            )


def initial_network(prepared: Prepared, engine: Engine, begun, display: Display) -> Network:
    """The network with its first weights, which come from the seed or from `init_from`.

    Args:
      begun: true if the run has checkpoints, whose weights replace the first.
    """
    config, model = prepared.config, _initial_model(prepared, engine)
    if config.init_from and not begun:
        dataset = prepared.dataset
        _fine_tune(model, config, dataset.class_names, display.say, dataset.own_splits)
    return Network(model, freeze_backbone=config.freeze_backbone)


def _check_images(network: Network, prepared: Prepared, axis_name: str | None):
    """Raises InputError for images and batches too small for the network. Only the smallest are
    tried: a deep network takes seconds to trace."""
    batch_size, size = prepared.config.batch_size, prepared.config.data.image_size
    alone = min(batch_size, prepared.config.model.batch_norm_images or batch_size)
    if alone > 1 and size >= SMALLEST:
        return
    images = jax.ShapeDtypeStruct((1, batch_size, *prepared.image_shape), jnp.float32)
    apply = functools.partial(network.apply, train=True)
    try:
        jax.eval_shape(jax.vmap(apply, (None, 0), axis_name=axis_name), network.initial, images)
    except InputError as error:
        raise InputError(f"`batch_size` {batch_size}, `image_size` {size}: {error}") from None


def _weights_digest(network: Network) -> dict:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(network.initial)):
        digest.update(leaf.tobytes())
    return {"the initial weights": digest.hexdigest()}


def _open_directory(run_dir: Path | None, config: TrainConfig, **how) -> RunDirectory:
    """The first process makes and owns it; the others have to find it."""

    def owned():
        return distributed.is_first() and RunDirectory(run_dir or reserve(config), **how)

    own = distributed.run_on_all(owned)
    path = distributed.exchange(str(own.path) if own else None)[0]
    return distributed.run_on_all(lambda: own or SharedDirectory(path))


def _initial_model(prepared: Prepared, engine: Engine) -> nnx.Module:
    config, dataset = prepared.config, prepared.dataset
    if not len(dataset.validation):
        check_unvalidated(config)
    return create_from_config(
        config.model,
        in_channels=dataset.channels,
        seed=config.seed,
        bn_axis_name=engine.axis_name,
    )


def _fine_tune(
    model,
    config: TrainConfig,
    class_names: Sequence[str],
    say: Callable,
    own_splits: Sequence[str] = (),
):
    """Weights of another run or file, but for the head where it has to be new."""
    source = config.init_from
    weights = pretrained(source, config.weights_key, ema=config.ema, say=say)
    _say_other_normalisation(weights.data, config, say)
    _say_other_division(weights.divided, config, own_splits, say)
    arrays = in_order(weights, class_names)
    if arrays is not None:
        say(f"{source}: the same classes in another order, matched by name")
    arrays = weights.arrays if arrays is None else arrays
    own = convert.state_dict(model)
    head = {name: array for name, array in own.items() if name.startswith("fc.")}
    fits = all(n in arrays and np.shape(arrays[n]) == array.shape for n, array in head.items())
    new = config.new_head or not fits
    if new:
        arrays = {n: array for n, array in arrays.items() if not n.startswith("fc.")} | head
    try:
        convert.load_state_dict(model, arrays)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if new:
        say(f"the head is new: {config.model.num_classes} classes")


def _say_other_division(own: dict, config: TrainConfig, own_splits: Sequence[str], say: Callable):
    taken = {name: getattr(config.data, name) for name in own}
    if {*own_splits} == {"validation", "test"} and not (own.get("folds") or config.data.folds):
        return  # nothing is divided
    names = own.keys() - {"dataset"}
    other = any(own[name] != taken[name] for name in names)
    if other and same_place(own["dataset"], taken["dataset"]):
        say(
            f"warning: {config.init_from} divided {own['dataset']} otherwise: its training images"
            " may be validation or test images here"
        )


def _say_other_normalisation(known: dict, config: TrainConfig, say: Callable):
    for name in known.keys() & {"mean", "std"}:
        taken = getattr(config.data, name)
        if taken is not None and not np.array_equal(np.round(taken, 4), np.round(known[name], 4)):
            own, new = (" ".join(f"{x:.4g}" for x in values) for values in (known[name], taken))
            say(f"warning: `{name}` of {config.init_from} is {own}, this run takes {new}")
