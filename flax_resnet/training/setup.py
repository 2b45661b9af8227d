"""The set-up of a training: state, data and compiled functions before the first step."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from flax_resnet.config import TrainConfig
from flax_resnet.data import pipeline, workers
from flax_resnet.data.prepare import Prepared, check_contents, contents
from flax_resnet.devices import distributed
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.display import Display
from flax_resnet.training import steps
from flax_resnet.training.network import Network, Preprocess
from flax_resnet.training.profiling import Profiler
from flax_resnet.training.progress import Progress

Callback = Callable[[str, int, dict], object]
"""Called with "step", "epoch" or "end", the number of steps done, and {name: value}."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """A training under way: its parts and its state."""

    prepared: Prepared
    """The data set, and the config as it was resolved for it."""

    contents: dict
    """Classes, sizes and digests of the data set (`data.prepare.contents`)."""

    engine: Engine
    network: Network
    directory: RunDirectory
    display: Display
    checkpoints: Checkpoints

    progress: Progress
    """Epochs and steps done."""

    state: steps.TrainState
    """The state of the step, on the devices."""

    batches: Iterator
    """This process's batches, from the next step on."""

    resident: dict
    """Images and labels of the training split on the devices; {} where batches bring their own."""

    steps_per_dispatch: int

    train_fns: dict
    """{steps a dispatch: compiled function}."""

    member_fns: dict
    """{steps a dispatch: compiled function of several runs at once}."""

    eval_fn: object
    """The compiled evaluation of a batch."""

    in_flight: list = dataclasses.field(default_factory=list)
    """Metrics that have not been fetched from the devices."""

    last_finite: dict | None = None
    """Metrics of the last step that was finite."""

    saveable: Progress | None = None
    """The progress that belongs to the state, while a checkpoint of both could be resumed."""

    checkpoint_seconds: float = 0.0
    """Time that saves have taken since the last row of timings."""

    signum: int | None = None
    """The signal that asked the run to stop."""

    callbacks: Sequence[Callback] = ()
    """Functions that are told of steps, epochs and the end."""

    profiler: Profiler
    """Traces steps, if it was asked to."""

    @property
    def config(self):
        """The resolved `TrainConfig`."""
        return self.prepared.config

    @property
    def dataset(self):
        """`data.sources.DataSet`."""
        return self.prepared.dataset

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, over all devices."""
        return _steps_per_epoch(self.prepared)

    @property
    def global_step(self) -> int:
        """Steps done since the first epoch."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step_in_epoch

    def notify(self, event: str, values: dict):
        """Call the callbacks; of several processes, in the first alone."""
        if distributed.is_first():
            for callback in self.callbacks:
                callback(event, self.global_step, values)

    def close(self):
        """End the trace and the worker processes."""
        self.profiler.close()
        if isinstance(self.batches, workers.InTurn):
            self.batches.close()


def set_up(
    prepared: Prepared,
    engine: Engine,
    network: Network,
    directory: RunDirectory,
    display: Display,
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback] = (),
    profile: int = 0,
    like: Run | None = None,
) -> Run:
    """A fresh run, or one that goes on from its newest sound checkpoint; nothing is compiled yet.

    Args:
      like: a run that differs in its seed alone; the images on the devices and the compiled
        evaluation are shared with it.

    Raises:
      InputError: the data are others than before, or no checkpoint of a fine-tuning is sound.
    """
    config = prepared.config
    step = checkpoints.latest()
    distributed.check_agreement({"checkpoint": step})
    state, progress = steps.make_state(network.initial, config), Progress()
    document, found = None, contents(prepared.dataset, prepared.class_weights)
    if step is None:
        _check_fresh(config, directory, checkpoints, display)
    else:
        document = checkpoints.document(step)
        check_contents(found, document.get("contents", {}))
        progress = Progress.from_document(document["progress"])
        _say_resumed(display, step, document, engine)
        state = checkpoints.restore(step, engine.state_like(state))
    checkpoints.delete_after(step)
    batches = _batches(prepared, engine, start=step or 0)
    directory.start_logs(document, step or 0)
    resident = like.resident if like else _resident(prepared, engine)
    of_data = {"class_weights": prepared.class_weights, "resident": bool(resident)}
    of_data["steps_per_epoch"] = _steps_per_epoch(prepared)
    run = Run(
        prepared=prepared,
        contents=found,
        engine=engine,
        network=network,
        directory=directory,
        display=display,
        checkpoints=checkpoints,
        progress=progress,
        state=engine.place_state(state),
        batches=batches,
        resident=resident,
        callbacks=callbacks,
        profiler=Profiler(directory.path, profile),
        **functions(config, engine, network, **of_data),
    )
    if like:
        run.eval_fn = like.eval_fn
    return run


def _check_fresh(
    config: TrainConfig, directory: RunDirectory, checkpoints: Checkpoints, display: Display
):
    """Raises InputError where a run without a sound checkpoint may not begin again."""
    if config.init_from and steps_in(checkpoints.directory):
        raise InputError(
            f"{directory.path}: none of its checkpoints is sound, and its weights came"
            f" from {config.init_from}: remove it, or begin again with `overwrite`"
        )
    if (table := directory.path / "metrics.csv").exists():
        display.say(f"no checkpoint belongs to {table}: the run begins again at step 0")


def _steps_per_epoch(prepared: Prepared) -> int:
    return pipeline.steps_per_epoch(len(prepared.dataset.train), prepared.config.batch_size)


def _say_resumed(display: Display, step: int, document: dict, engine: Engine):
    display.say(f"resumed at step {step}, epoch {document['progress']['epoch'] + 1}")
    before, now = document["num_devices"], len(engine.devices)
    if before != now:
        display.say(
            f"the run had {before} device(s) and now has {now}: it goes on equal up to"
            " rounding, not bit for bit"
        )


def _batches(prepared: Prepared, engine: Engine, start: int) -> Iterator:
    """Batches from step `start` on: indices where the images are cached, else images."""
    config, train = prepared.config, prepared.dataset.train
    order = pipeline.BatchOrder(
        num_images=len(train),
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        repeats=config.augment.repeated_augmentation,
        labels=train.labels if config.data.sampler == "balanced" else None,
        rows=engine.local_rows(config.batch_size),
    )
    if "train" in prepared.images:
        return pipeline.index_iterator(order, start=start)
    workers = config.data.num_workers
    decoder = prepared.training_decoder
    return pipeline.image_iterator(train, decoder, order, num_workers=workers, start=start)


def _resident(prepared: Prepared, engine: Engine) -> dict:
    if "train" not in prepared.images:
        return {}
    labels = prepared.dataset.train.labels.astype("int32")
    return engine.replicate({"image": prepared.images["train"], "label": labels})


def functions(
    config: TrainConfig,
    engine: Engine,
    network: Network,
    *,
    steps_per_epoch: int,
    resident: bool,
    class_weights: np.ndarray | None = None,
) -> dict:
    """The compiled functions of a run, as fields of `Run`; XLA compiles each when it is first
    called.

    Args:
      config: resolved for its data.
      resident: whether the training images are on the devices.
      class_weights: of the classes in the loss, [K]; None: all equal.
    """
    preprocess = Preprocess(config.data.mean, config.data.std)
    num_classes = config.model.num_classes
    train_step = steps.make_train_step(
        network,
        config,
        preprocess,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        axis_name=engine.axis_name,
        gather=engine.gather,
        class_weights=class_weights,
    )
    eval_step = steps.make_eval_step(network, preprocess, num_classes=num_classes)
    count = engine.steps_per_dispatch(resident=resident)
    return {
        "steps_per_dispatch": count,
        "train_fns": {k: engine.compile_train(train_step, k) for k in {1, count}},
        "member_fns": {k: engine.compile_members(train_step, k) for k in {1, count}},
        "eval_fn": engine.compile_eval(eval_step),
    }


def abstract_state(run: Run) -> steps.TrainState:
    """Shapes and types of the state as it is saved."""
    return jax.eval_shape(lambda: run.engine.single(run.state))
