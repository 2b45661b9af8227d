"""The same whole training by both `fit`s, from the same weights, on the same batches, in float64.

    python -m equivalence_tests.studies.trajectory  # how rounding grows with the learning rate

Writes results/error-growth.json and .png.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import matplotlib.pyplot as plt
import numpy as np
import sklearn.metrics
import torch
from rich.console import Console
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, TensorDataset

import torch_ref.prepare
import torch_ref.sources
from equivalence_tests import results
from flax_resnet.commands import cli
from flax_resnet.config import TrainConfig
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import Prepared, prepare
from flax_resnet.models import create_from_config
from flax_resnet.runs import environment
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.display import Display
from flax_resnet.training import fit
from flax_resnet.training.restore import load_weights
from flax_resnet.weights import convert
from torch_ref import checkpoint, loop, report, setup, steps

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclasses.dataclass(kw_only=True)
class Course:
    """The record of a training."""

    losses: list[float] = dataclasses.field(default_factory=list)
    """The loss of every step."""

    rates: list[float] = dataclasses.field(default_factory=list)
    """Learning rate of every step."""

    report: dict = dataclasses.field(default_factory=dict)
    """Epochs, best epoch, and metrics of every split with the best weights."""

    confusion: np.ndarray | None = None
    """The confusion matrix [K, K] of the test split."""

    weights: dict = dataclasses.field(default_factory=dict)
    """The best, as torch's state_dict."""


def config(**changes) -> TrainConfig:
    """120 steps of resnet20 on the digits, without anything random in them."""
    base = {
        "epochs": 8,
        "batch_size": 32,
        "log_steps": 1,
        "model": {"arch": "resnet20", "dtype": "float64"},
        "augment": {"random_crop": 0},
        "data": {"train_images": 480, "eval_images": 72},
        "optimizer": {"lr": 0.01},
        "parallel": {"devices": 1},
        "compilation_cache": False,
    }
    return cli.merge(cli.merge(TrainConfig(), base), changes)


def both(config: TrainConfig) -> tuple[Course, Course]:
    """JAX's and torch's course."""
    with _jax_set_up(config), tempfile.TemporaryDirectory() as folder:
        prepared = prepare(config)
        initial = _initial_weights(prepared)
        return in_jax(config, Path(folder)), in_torch(prepared, initial)


def nudged(config: TrainConfig) -> Course:
    """JAX's course with one change: each initial weight of the first convolution is multiplied by
    1 + eps. The distance from JAX's own course shows how far rounding alone grows."""
    with _jax_set_up(config), tempfile.TemporaryDirectory() as folder:
        weights = _initial_weights(prepare(config))
        first = next(name for name, array in weights.items() if np.ndim(array) == 4)
        weights[first] = weights[first] * (1 + np.finfo(np.float64).eps)
        file = Path(folder) / "nudged.safetensors"
        save_file(weights, file)
        return in_jax(dataclasses.replace(config, init_from=str(file)), Path(folder))


@contextlib.contextmanager
def _jax_set_up(config: TrainConfig):
    """JAX as `fit` sets it for this config, and as it was afterwards."""
    before = jax.config.jax_enable_x64
    environment.configure_jax(config)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _initial_weights(prepared: Prepared) -> dict:
    model = create_from_config(
        prepared.config.model, in_channels=prepared.dataset.channels, seed=prepared.config.seed
    )
    return convert.state_dict(model)


def in_jax(config: TrainConfig, folder: Path) -> Course:
    course = Course()

    def log_step(self, step, row):
        course.losses.append(row["loss"])
        course.rates.append(row["learning_rate"])

    def write_results(self, report, counts, class_names):
        course.report, course.confusion = report, np.asarray(counts["confusion"])

    recorded = {"log_step": log_step, "write_results": write_results}
    with mock.patch.multiple(RunDirectory, **recorded):
        fit.fit(config, folder / "run", display=Display(Console(quiet=True)))
    course.weights = load_weights(folder / "run")
    return course


def in_torch(prepared: Prepared, initial: dict) -> Course:
    config, course = prepared.config, Course()
    model = torch_ref.create_from_config(config.model, prepared.dataset.channels)
    model.load_state_dict(checkpoint.to_tensors(initial))
    train_step = steps.train_step

    def recording(model, optimizer, *args, **kwargs):
        course.rates.append(optimizer.param_groups[0]["lr"])
        loss = train_step(model, optimizer, *args, **kwargs)
        course.losses.append(loss.item())
        return loss

    data = _torch_data(prepared)
    loader = _loader_of_the_same_batches(prepared)
    with mock.patch.object(setup, "loader", loader):
        run = setup.set_up(model, data, torch.device("cpu"))
    with mock.patch.object(loop, "train_step", recording):
        loop.train(run)
    course.report = report.report(run)
    course.confusion = _confusion(model, data.dataset.splits["test"])
    course.weights = checkpoint.to_arrays(model.state_dict())
    return course


def _torch_data(prepared: Prepared) -> torch_ref.prepare.Prepared:
    splits = {}
    for name in ("train", "validation", "test"):
        source = getattr(prepared.dataset, name)
        images = pipeline.decode_all(source, prepared.decoder).astype(np.float64) / 255
        images = (images - np.array(prepared.config.data.mean)) / prepared.config.data.std
        labels = torch.from_numpy(np.asarray(source.labels, np.int64))
        splits[name] = TensorDataset(torch.from_numpy(images.transpose(0, 3, 1, 2)), labels)
    names, channels = prepared.dataset.class_names, prepared.dataset.channels
    dataset = torch_ref.sources.DataSet(splits, names, channels)
    return torch_ref.prepare.Prepared(prepared.config, dataset, splits["train"])


class Epochs:
    """The batches of one epoch after the other, as flax_resnet draws them."""

    def __init__(self, order: pipeline.BatchOrder):
        self.order, self.next = order, 0

    def __len__(self) -> int:
        return len(self.order) // self.order.epochs

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            self.next += 1
            yield (self.order[self.next - 1] % self.order.num_images).tolist()


def _loader_of_the_same_batches(prepared: Prepared):
    config = prepared.config
    order = pipeline.BatchOrder(
        num_images=len(prepared.dataset.train),
        batch_size=config.batch_size,
        seed=config.seed,
        epochs=config.epochs,
        repeats=config.augment.repeated_augmentation,
    )

    def loader(images, batch_size, *, seed=None, **options):
        if seed is None:
            return DataLoader(images, batch_size)
        return DataLoader(images, batch_sampler=Epochs(order))

    return loader


@torch.no_grad()
def _confusion(model, split: TensorDataset) -> np.ndarray:
    images, labels = split.tensors
    images = images.to(next(model.parameters()).dtype)
    return sklearn.metrics.confusion_matrix(labels, model.eval()(images).argmax(1))


def distance(got: dict, expected: dict) -> float:
    """The largest relative difference of a tensor (norms)."""
    differences = [
        np.linalg.norm(got[n] - e) / np.linalg.norm(e) if e.any() else got[n].any()
        for n, e in expected.items()
    ]
    return float(np.max(differences))  # max() would pass over what is no number


def error_growth() -> list[dict]:
    """Differences of losses and weights after 120 steps at each learning rate."""
    rows = []
    for lr in RATES:
        got, expected = both(config(optimizer={"lr": lr}))
        losses = np.array([got.losses, expected.losses])
        rows.append({
            "lr": lr,
            "loss_differences": np.abs(losses[0] / losses[1] - 1).tolist(),
            "weights_difference": distance(got.weights, expected.weights),
        })  # fmt: skip
        print(lr, f"weights {rows[-1]['weights_difference']:.1e}", flush=True)
    return rows


def plot(rows: list[dict], path: Path):
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = plt.colormaps["viridis"](np.linspace(0.1, 0.9, len(rows)))
    for row, colour in zip(rows, colours, strict=True):
        values = np.maximum.accumulate(np.maximum(row["loss_differences"], 1e-17))
        axis.plot(range(1, len(values) + 1), values, color=colour, label=f"lr {row['lr']}")
    axis.set(yscale="log", xlabel="step", ylabel="relative difference of the loss, largest so far")
    axis.set_title("Rounding in float64, resnet20: one training in JAX and in PyTorch", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> int:
    rows = error_growth()
    results.write("error-growth", {"rows": rows})
    plot(rows, results.FOLDER / "error-growth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
