"""The part of convert.py that needs PyTorch, which is an extra: weights, trainings and ONNX."""

from pathlib import Path

import numpy as np

from flax_resnet.config import TrainConfig
from flax_resnet.errors import InputError, extra_needed
from flax_resnet.interop import export, training_state
from flax_resnet.interop.loaded_run import LoadedRun
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.training import restore
from flax_resnet.weights import convert


def torch_ref():
    """The package `torch_ref`; InputError if PyTorch is not installed."""
    try:
        import torch_ref.optim
        import torch_ref.training_state
    except ModuleNotFoundError as error:
        raise extra_needed("PyTorch's files", error.name, "torch") from None
    return torch_ref


def onnx_file():
    """The module `torch_ref.onnx_file`; InputError if the extra `export` is not installed."""
    try:
        from torch_ref import onnx_file
    except ModuleNotFoundError as error:
        raise extra_needed("ONNX", error.name, "export") from None
    return onnx_file


def reading(path: Path, read, *arguments):
    """The result of `read(path, *arguments)`; its OSError becomes an InputError."""
    try:
        return read(path, *arguments)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def write_weights(path: Path, arrays: dict[str, np.ndarray]):
    files = torch_ref().checkpoint
    export.write_verified(path, arrays, files.save, files.load)


def write_onnx(path: Path, run: LoadedRun, *, fold_batchnorm: bool):
    """Write the PyTorch twin with the run's weights as ONNX, with the preprocessing as metadata."""
    if run.config.model.dtype == "float64":
        raise InputError(f"{path}: ONNX Runtime has no float64 convolutions; write .stablehlo")
    onnx, data = onnx_file(), run.config.data
    net = torch_ref().create_from_config(run.config.model, run.channels)
    arrays = convert.state_dict(run.network.to_model(run.variables))
    net.load_state_dict(torch_ref().checkpoint.to_tensors(arrays))
    net = onnx.fold_batchnorm(net) if fold_batchnorm else net
    notes = {"class_names": run.class_names, "mean": data.mean, "std": data.std}
    fields = "resize_size", "image_size", "interpolation", "grayscale", "exif_transpose"
    notes |= {name: getattr(data, name) for name in fields}

    def save(path):
        onnx.save(path, net, (run.channels, *run.image_shape[:2]), notes)

    def load(path):
        program = onnx.load(path)
        return lambda images: program(normalized(images, run).transpose(0, 3, 1, 2))

    export.write_program(path, run, save, load)


def normalized(images: np.ndarray, run: LoadedRun) -> np.ndarray:
    """The input of the ONNX program for uint8 images, still channels last."""
    return np.asarray(run.preprocess.normalize(run.preprocess.to_unit(images)))


def make_training(config: TrainConfig, channels: int):
    """The model, the optimizer and the moving average (or None) of a run's config, in PyTorch."""
    if config.schedule.schedule == "plateau":
        raise InputError("--training: the cuts of the plateau schedule do not convert")
    net, rules = torch_ref().create_from_config(config.model, channels), torch_ref().optim
    if config.freeze_backbone:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
    rule = config.optimizer
    ema = rules.make_ema(net, rule.ema_decay) if rule.ema_decay else None
    return net, rules.make_optimizer(net, rule), ema


def write_training(path: Path, run_dir: Path) -> int:
    """Write the latest state of a run as a `torch_ref.training_state` file; returns its steps."""
    document, config, _, state = restore.restore(run_dir, Checkpoints.latest)
    arrays = training_state.training_arrays(state, config.optimizer)
    parts = make_training(config, document["channels"])
    files = torch_ref().training_state
    step = files.load_training_arrays(arrays, *parts, config.optimizer.accumulate_steps)

    def load(path):
        again = make_training(config, document["channels"])
        back = files.load(path, *again)
        return training_state.flat(files.training_arrays(*again, back))

    export.write_verified(
        path,
        training_state.flat(files.training_arrays(*parts, step)),
        lambda path, _: files.save(path, *parts, step),
        load,
    )
    return step


def read_training(path: Path, config: TrainConfig, channels: int) -> dict:
    """The content of a `torch_ref.training_state` file, for
    `interop.training_state.load_training_arrays`."""
    files, parts = torch_ref().training_state, make_training(config, channels)
    return files.training_arrays(*parts, reading(path, files.load, *parts))
