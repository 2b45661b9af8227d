"""A run in the making: set up or taken up, trained epoch by epoch, reported."""

import contextlib
import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.config import to_dict
from flax_resnet.data import pipeline, workers
from flax_resnet.data.prepare import SPLITS, Prepared, check_contents, contents
from flax_resnet.devices import distributed
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.models.summary import stage_rows, summary_table
from flax_resnet.runs import environment
from flax_resnet.runs.checkpoint import Checkpoints, steps_in
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.display import Display
from flax_resnet.training import early_stopping, optim, sanity, steps
from flax_resnet.training.early_stopping import EarlyStopping
from flax_resnet.training.evaluation import evaluate
from flax_resnet.training.network import Network, Preprocess
from flax_resnet.training.progress import Interrupted, NonFiniteLoss, Progress, SignalFlag

_AHEAD = 4
"""Dispatches given to the devices and not done: more keep no device busier, but the batches of each
lie in its memory, and who asks the run to stop waits for all."""

_LOGGED = ("loss", "accuracy", "top5_accuracy", "precision_macro", "recall_macro", "f1_macro")


_SMALLER_STEPS = "a new --run-dir with a smaller --lr or --clip-norm 1"


class Run:
    """A run in the making: the state on the devices and what surrounds it."""

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        network: Network,
        directory: RunDirectory,
        display: Display,
        command: str,
    ):
        self.prepared, self.engine = prepared, engine
        self.config, self.dataset = prepared.config, prepared.dataset
        self.directory, self.display, self.command = directory, display, command
        self.network, self.contents = network, contents(self.dataset)
        self.preprocess = Preprocess(self.config.data.mean, self.config.data.std)
        self.stages = stage_rows(network.to_model(network.initial), prepared.image_shape)
        self.num_train = len(self.dataset.train)
        self.steps_per_epoch = pipeline.steps_per_epoch(self.num_train, self.config.batch_size)
        self.progress = Progress()
        self.pending, self.signum, self.last_finite = [], None, None
        self.iterator = None
        self.whole = None  # the progress that belongs to the state, while there is more of it
        self.save_wait = 0.0

    def execute(self) -> dict:
        """All of it: set up or take up, train, report."""
        self._announce()
        self.directory.write_config(self.config)
        self.checkpoints = Checkpoints(self.directory.checkpoints, say=self.display.say)
        try:
            self._set_up()
            with SignalFlag(self):
                self._train()
                return self._report()
        except Exception as error:
            with contextlib.suppress(AttributeError):  # a few exceptions take no notes
                error.run_dir, error.saved = self.directory.path, self._rescue(error)
            raise
        finally:
            self._end_workers()
            self.checkpoints.close()

    def _rescue(self, error: Exception) -> bool:
        """Save what a failure within the training would lose; whether that could be done."""
        if self.whole is None or isinstance(error, distributed.Everywhere) or self.engine.several:
            return getattr(error, "saved", False)
        try:
            if self.pending:
                self._drain()
            self.progress = self.whole
            self._save(improvement=False)
            self.checkpoints.wait()
            return True
        except Exception:  # the first error is the one to tell
            return False

    def _end_workers(self):
        if isinstance(self.iterator, workers.InTurn):
            self.iterator.close()

    def _announce(self):
        model, data = self.config.model, self.config.data
        sizes = [len(getattr(self.dataset, s)) for s in SPLITS]
        self.display.show(summary_table(model.arch, self.stages))
        self.display.say(
            f"{data.dataset}: {sizes[0]:,} training, {sizes[1]:,} validation, {sizes[2]:,} test"
            f" images, {model.num_classes} classes; {model.arch}"
            + (f", stem {model.stem}" if model.stem else "")
            + (f", shortcut {model.shortcut}" if model.shortcut else "")
            + f", images {data.image_size}x{data.image_size}x{self.dataset.channels}"
        )
        self._warn(sanity.of_training(self.num_train, self.config.batch_size))
        if data.num_workers and "train" in self.prepared.images:
            self._warn(["num_workers has no effect: the training images are cached"])
        kind = jax.devices()[0].device_kind
        self.display.say(f"on {len(self.engine.devices)} x {kind}, run {self.directory.path}")

    def _warn(self, warnings: list[str]):
        for warning in warnings:
            self.display.say(f"warning: {warning}")

    def _set_up(self):
        """Fresh state, or that of the newest sound checkpoint; compiled functions."""
        config = self.config
        state = steps.make_state(self.network.initial, config)
        step = self.checkpoints.latest()
        distributed.check_agreement({"checkpoint": step})
        if step is not None:
            state = self._restored(step, state)
        elif config.init_from and steps_in(self.checkpoints.directory):
            raise InputError(
                f"{self.directory.path}: none of its checkpoints is sound, and its weights came"
                f" from {config.init_from}: begin again with --overwrite"
            )
        self.checkpoints.delete_after(step)
        self.iterator = self._iterator(start=step or 0)
        document = None if step is None else self.checkpoints.document(step)
        self.directory.start_logs(document, step or 0)
        self.state = self.engine.place_state(state)
        self.resident = self._resident()
        train_step = steps.make_train_step(
            self.network,
            config,
            self.preprocess,
            num_classes=config.model.num_classes,
            steps_per_epoch=self.steps_per_epoch,
            axis_name=self.engine.axis_name,
            gather=self.engine.gather,
        )
        self.at_once = self.engine.steps_per_dispatch(resident=bool(self.resident))
        self.train_fns = {k: self.engine.compile_train(train_step, k) for k in {1, self.at_once}}
        eval_step = steps.make_eval_step(
            self.network, self.preprocess, num_classes=config.model.num_classes
        )
        self.eval_fn = self.engine.compile_eval(eval_step)

    def _restored(self, step, state):
        document = self.checkpoints.document(step)
        check_contents(self.contents, document.get("contents", {}))
        self.progress = Progress(**document["progress"])
        self.display.say(f"resumed at step {step}, epoch {self.progress.epoch + 1}")
        before, now = document["num_devices"], len(self.engine.devices)
        if before != now:
            self.display.say(
                f"the run had {before} device(s) and now has {now}: it goes on equal up to"
                " rounding, not bit for bit"
            )
        return self.checkpoints.restore(step, self.engine.state_like(state))

    def _resident(self) -> dict:
        if "train" not in self.prepared.images:
            return {}
        labels = self.dataset.train.labels.astype("int32")
        return self.engine.replicate({"image": self.prepared.images["train"], "label": labels})

    def _iterator(self, start: int):
        config = self.config
        order = pipeline.BatchOrder(
            num_images=self.num_train,
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=config.epochs,
            rows=self.engine.local_rows(config.batch_size),
        )
        if "train" in self.prepared.images:
            return pipeline.index_iterator(order, start=start)
        return pipeline.image_iterator(
            self.dataset.train,
            self.prepared.training_decoder,
            order,
            num_workers=config.data.num_workers,
            start=start,
        )

    def _train(self):
        config, progress = self.config, self.progress
        self.display.start(
            total_steps=config.epochs * self.steps_per_epoch,
            done_steps=progress.epoch * self.steps_per_epoch + progress.step_in_epoch,
            batch_size=config.batch_size,
        )
        while progress.epoch < config.epochs and not progress.stopped_early:
            self.whole = progress
            self._train_epoch()
            self.whole = dataclasses.replace(progress)  # until the epoch is logged
            self._finish_epoch()
        self.display.stop()

    def _train_epoch(self):
        """One pass over the training split, or the rest of one that was cut off."""
        progress = self.progress
        start = time.monotonic() - progress.seconds
        while progress.step_in_epoch < self.steps_per_epoch:
            left = self.steps_per_epoch - progress.step_in_epoch
            count = self.at_once if left >= self.at_once else 1
            before = time.monotonic()
            batches = [next(self.iterator) for _ in range(count)]
            progress.data_wait += time.monotonic() - before
            self.state, metrics = self.train_fns[count](
                self.state, self.resident, self.engine.shard(self._columns(batches))
            )
            self.pending.append(metrics)
            progress.step_in_epoch += count
            jax.block_until_ready(self.pending[:-_AHEAD][-1:])
            self.checkpoints.check()
            pause = self._at_log_step(count) or count == left
            if pause or (self.signum and not self.engine.several):
                self._drain()
                progress.seconds = time.monotonic() - start
                self._stop_if_asked()

    def _stop_if_asked(self):
        """Asked in any process, all of them stop here, with everything done so far saved."""
        signum = distributed.agreed_signal(self.signum)
        if signum:
            self._save(improvement=False)
            self.checkpoints.wait()
            raise Interrupted(signum)

    def _columns(self, batches):
        return batches if not self.resident else [{"index": indices} for indices in batches]

    def _at_log_step(self, count):
        step, every = self.progress.step_in_epoch, self.config.log_steps
        return step // every != (step - count) // every

    def _drain(self):
        """Fetch the metrics of all steps since the last time; stop if they are no numbers."""
        progress, step = self.progress, self._global_step()
        metrics = [self.engine.fetch_metrics(m) for m in self.pending]
        self.pending = []
        rows = [
            {name: values[i] for name, values in m.items()}
            for m in metrics
            for i in range(len(m["loss"]))
        ]
        for offset, row in enumerate(rows):
            self._check_finite(step - len(rows) + offset + 1, row)
            if row["finite"]:
                progress.loss_sum += float(row["loss"])
                progress.accuracy_sum += float(row["accuracy"])
                progress.counted_steps += 1
        last = {name: float(value) for name, value in rows[-1].items()}
        progress.learning_rate = last["learning_rate"]
        self.directory.log_step(step, last)
        self.display.step(
            step=step,
            epoch=progress.epoch + 1,
            epochs=self.config.epochs,
            loss=last["loss"],
            accuracy=last["accuracy"],
        )

    def _check_finite(self, step, row):
        if row["finite"]:
            self.last_finite, self.progress.bad_steps = row, 0
            return
        self.progress.bad_steps += 1
        if self.progress.bad_steps <= self.config.skip_nonfinite:
            return
        seen = "no step before it was finite"
        if self.last_finite is not None:
            seen = (
                f"last finite loss {self.last_finite['loss']:.6g},"
                f" gradient norm {self.last_finite['gradient_norm']:.6g}"
            )
        saved = self.checkpoints.latest()
        from_where = f"checkpoint of step {saved}" if saved is not None else "no checkpoint yet"
        raise NonFiniteLoss(
            f"step {step}: the loss or gradient is not finite; {seen}; {from_where}"
            f" in {self.directory.path}; --init-from it in {_SMALLER_STEPS}"
        )

    def _finish_epoch(self):
        """Validate, decide whether to stop, log, checkpoint."""
        config, progress = self.config, self.progress
        progress.epoch += 1
        if not progress.counted_steps:
            raise NonFiniteLoss(
                f"epoch {progress.epoch}: no step had a finite loss and gradient; begin again in"
                f" {_SMALLER_STEPS}"
            )
        row = {
            "epoch": progress.epoch,
            "step": progress.epoch * self.steps_per_epoch,
            "learning_rate": progress.learning_rate,
            "train_loss": progress.loss_sum / progress.counted_steps,
            "train_accuracy": progress.accuracy_sum / progress.counted_steps,
        }
        timing = {
            "epoch": progress.epoch,
            "steps": self.steps_per_epoch,
            "seconds": progress.seconds,
            "images_per_second": self.steps_per_epoch * config.batch_size / progress.seconds,
            "data_wait_seconds": progress.data_wait,
            "checkpoint_seconds": self.save_wait,  # since the row before
        }
        self.save_wait = 0.0
        progress.step_in_epoch = progress.counted_steps = 0
        progress.loss_sum = progress.accuracy_sum = 0.0
        progress.seconds = progress.data_wait = 0.0
        improvement = False
        if len(self.dataset.validation):
            improvement = self._validate(row)
        last = progress.epoch == config.epochs or progress.stopped_early
        self.whole = None  # its tables are ahead of it
        self.directory.log_epoch(row["step"], row, timing)
        self.display.epoch(row, timing, config.epochs)
        if improvement or last or progress.epoch % config.checkpoint_epochs == 0:
            self._save(improvement=improvement)

    def _validate(self, row) -> bool:
        """Fill in the row; True where this epoch is the best so far."""
        config, progress = self.config, self.progress
        values, _ = self._evaluate("validation")
        row |= {f"validation_{name}": values[name] for name in _LOGGED}
        watched = row[config.early_stopping.monitor]
        stopping, progress.stopped_early = early_stopping.update(
            EarlyStopping(**progress.stopping), watched, progress.epoch, config.early_stopping
        )
        progress.stopping = dataclasses.asdict(stopping)
        if config.schedule.schedule == "plateau":
            self._cut_on_plateau(watched)
        best = dataclasses.replace(config.early_stopping, min_delta=0.0)
        if not early_stopping.is_improvement(progress.best, watched, best):
            return False
        progress.best, progress.best_epoch = watched, progress.epoch
        return True

    def _cut_on_plateau(self, watched):
        config = self.config
        accumulate = config.optimizer.accumulate_steps
        update, an_epoch = self._global_step() // accumulate, self.steps_per_epoch / accumulate
        self.progress.plateau, scale = optim.plateau(
            self.progress.plateau,
            watched,
            config.schedule,
            config.optimizer.lr,
            config.early_stopping.mode,
            optim.warmth(config.schedule, update, an_epoch),
        )
        dtype = self.state.lr_scale.dtype
        self.state = self.state._replace(lr_scale=self.engine.replicate(jnp.asarray(scale, dtype)))

    def _evaluate(self, split: str, variables=None):
        if variables is None:
            variables = steps.evaluation_variables(self.engine.single(self.state))
        source = getattr(self.dataset, split)
        images = self.prepared.images.get(split)
        size = -(-self.config.eval_batch_size // len(self.engine.devices))
        size *= len(self.engine.devices)
        rows = self.engine.local_rows(size)
        batches = pipeline.evaluation_batches(source, self.prepared.decoder, size, images, rows)
        return evaluate(self.engine, self.eval_fn, variables, batches)

    def _save(self, *, improvement: bool):
        self.directory.check()
        document = {
            "progress": dataclasses.asdict(self.progress),
            "num_devices": len(self.engine.devices),
            "config": to_dict(self.config),
            "class_names": list(self.dataset.class_names),
            "contents": self.contents,
            "channels": self.dataset.channels,
            "tables": self.directory.marks(),
            "improvement": improvement,
        }
        before = time.monotonic()
        state = self.engine.single(self.state)
        self.checkpoints.save(self._global_step(), state, document, improvement=improvement)
        self.save_wait += time.monotonic() - before

    def _report(self) -> dict:
        """Evaluate the chosen weights on every split and write everything down."""
        config, progress = self.config, self.progress
        self.checkpoints.wait()
        variables = steps.evaluation_variables(self.engine.single(self.state))
        evaluated_epoch = progress.epoch
        if config.early_stopping.restore_best and progress.best_epoch:
            best = self.checkpoints.best()
            evaluated_epoch = self.checkpoints.document(best)["progress"]["epoch"]
            like = self.engine.state_like(self._abstract_state())
            variables = steps.evaluation_variables(self.checkpoints.restore(best, like))
        splits, confusions = {}, {}
        for split in SPLITS:
            self._stop_if_asked()
            if len(getattr(self.dataset, split)):
                splits[split], confusions[split] = self._evaluate(split, variables)
        self._check_result(variables, splits, evaluated_epoch)
        if not distributed.is_first():
            return {"splits": splits}
        warnings = sanity.of_results(splits, confusions, self.dataset.class_names)
        report = {
            "splits": splits,
            "warnings": warnings,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch or progress.epoch,
            "evaluated_epoch": evaluated_epoch,
            "stopped_early": progress.stopped_early,
            **self._speed(),
            "left_out_images": len(self.dataset.bad_images),
            "command": self.command,
            "environment": environment.describe(len(self.engine.devices)),
        }
        last = list(splits)[-1]
        self.directory.write_results(report, confusions[last], self.dataset.class_names)
        self.display.results(splits, config.model.num_classes)
        self._warn(warnings)
        self.display.say(
            f"{report['seconds']:.0f} s of training, {report['images_per_second']:,.0f} images/s,"
            f" {report['data_wait_share']:.1%} of it waiting for data; {self.directory.path}"
        )
        return report

    def _check_result(self, variables, splits, epoch):
        """What is reported and served is made of numbers."""
        faults = [
            f"the {s} loss" for s, values in splits.items() if not np.isfinite(values["loss"])
        ]
        if not steps.is_finite(variables):
            faults.insert(0, "a weight")
        if faults:
            raise NonFiniteLoss(
                f"{faults[0]} after epoch {epoch} is not finite; {self.directory.path} has no"
                f" report; begin again in {_SMALLER_STEPS}"
            )

    def _speed(self) -> dict:
        """Seconds of training over all epochs; speed without the first, which compiles."""
        timings = self.directory.timings()
        steady = timings[1:] or timings
        seconds = sum(t["seconds"] for t in steady) or math.nan  # of a run whose rows are lost
        images = sum(t["steps"] for t in steady) * self.config.batch_size
        return {
            "seconds": sum(t["seconds"] for t in timings),
            "images_per_second": images / seconds,
            "data_wait_share": sum(t["data_wait_seconds"] for t in steady) / seconds,
        }

    def _abstract_state(self):
        return jax.eval_shape(lambda: self.engine.single(self.state))

    def _global_step(self) -> int:
        return self.progress.epoch * self.steps_per_epoch + self.progress.step_in_epoch
