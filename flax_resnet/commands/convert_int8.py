"""The part of convert.py that writes int8 ONNX files and says what they lose."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flax_resnet.commands import convert_torch, evaluate
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.sources import DataSet, same_place
from flax_resnet.errors import InputError, extra_needed
from flax_resnet.files import replacing
from flax_resnet.interop.loaded_run import LoadedRun
from flax_resnet.runs.views import warn
from flax_resnet.text import say

MOST_LOST = 0.01
"""Loss of accuracy from which the layers with the most noise are named."""

NOISIEST = 3
_AT_ONCE = 32


def write(path: Path, run: LoadedRun, name: str | None, count: int):
    """Write a run as an int8 ONNX file, and print its accuracy and its size beside float32's.

    Args:
      name: data set whose training images calibrate; None: the run's own.
      count: number of images that calibrate, drawn with the seed of the run.

    Raises:
      InputError: the data have other classes or channels, the run computes in float64, or the
        extra `export` is missing.
      DamagedExport: as in `convert_torch.write_onnx`.
    """
    if run.config.model.dtype == "float64":
        raise InputError(f"{path}: --int8 is not for a run in float64, which ONNX Runtime lacks")
    int8, dataset = _int8(), _dataset(run, name)
    images = calibration_images(run, dataset, count)
    facts = {"dataset": name or run.config.data.dataset, "images": len(images)}
    facts |= {"seed": run.config.seed}

    def batches(limit: int = len(images)) -> Iterator[np.ndarray]:
        for start in range(0, limit, _AT_ONCE):
            yield _inputs(images[start : min(start + _AT_ONCE, limit)], run)

    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        whole = Path(folder) / path.name
        convert_torch.write_onnx(whole, run, fold_batchnorm=True)
        int8.quantize(whole, temporary, batches, {"calibration": facts})
        share = temporary.stat().st_size / whole.stat().st_size
        say(f"calibrated on {len(images):,} training images of {facts['dataset']}, seed"
              f" {facts['seed']}; {share:.3f} of the size of float32")  # fmt: skip
        if not len(dataset.test):
            say("no test images, so the accuracy in int8 is not known")
            return
        before, after, equal = _compare(run, dataset, whole, temporary)
        say(f"{len(dataset.test):,} test images: accuracy {before:.4f} in float32, {after:.4f} in"
              f" int8; {equal:.2%} of the predictions are equal")  # fmt: skip
        if before - after > MOST_LOST:
            noise = int8.signal_to_noise(whole, temporary, lambda: batches(_AT_ONCE))
            worst = [f"{layer} ({noise[layer]:.1f} dB)" for layer in list(noise)[:NOISIEST]]
            lost = f"int8 loses {before - after:.4f} of the accuracy"
            warn(f"{lost}; the layers with the least signal to noise: {', '.join(worst)}")


def _int8():
    try:
        from flax_resnet.interop import int8
    except ModuleNotFoundError as error:
        raise extra_needed("--int8", error.name, "export") from None
    return int8


def _dataset(run: LoadedRun, name: str | None) -> DataSet:
    """The run's data, or named ones. Of named data that are too few to cut test images off, all
    images calibrate."""
    if name is None:
        return evaluate.open_data(run, None, "test")
    try:
        dataset = evaluate.open_data(run, name, "test")
    except InputError:
        if same_place(run.config.data.dataset, name):
            raise
        dataset = evaluate.open_data(run, name, "all")
    evaluate.check_classes(run, dataset, name)
    return dataset


def calibration_images(run: LoadedRun, dataset: DataSet, count: int) -> np.ndarray:
    """Training images drawn with the seed of the run, uint8 `[N, S, S, C]`, in the order of the
    data set."""
    source, rng = dataset.train, np.random.default_rng(run.config.seed)
    chosen = rng.choice(len(source), min(count, len(source)), replace=False)
    return pipeline.decode_all(source, evaluation_decoder(run.config.data), np.sort(chosen))


def _inputs(images: np.ndarray, run: LoadedRun) -> np.ndarray:
    return convert_torch.normalized(images, run).transpose(0, 3, 1, 2)


def _compare(run, dataset, whole: Path, small: Path) -> tuple[float, float, float]:
    """Accuracy on the test split in float32 and in int8, and the share of equal predictions."""
    programs = [convert_torch.onnx_file().load(path) for path in (whole, small)]
    order = np.array([run.class_names.index(name) for name in dataset.class_names])
    decoder, hits = evaluation_decoder(run.config.data), []
    for batch in pipeline.evaluation_batches(dataset.test, decoder, _AT_ONCE):
        images = _inputs(batch["image"], run)
        first, second = (program(images).argmax(-1)[batch["mask"]] for program in programs)
        labels = order[batch["label"]][batch["mask"]]
        hits.append(np.stack([first == labels, second == labels, first == second]))
    return tuple(np.concatenate(hits, axis=1).mean(1).tolist())
