"""Weights -> files and run directories: each is read again and compared before it has its name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from flax_resnet.checkpoint import Checkpoints, check_space
from flax_resnet.config import TrainConfig, to_dict
from flax_resnet.run_directory import RunDirectory
from flax_resnet.steps import TrainState

Arrays = dict[str, np.ndarray]


class DamagedExport(Exception):
    """What was written is not what is read back."""


def write_safetensors(path: Path, arrays: Arrays):
    """A .safetensors file; the same arrays give the same bytes, whatever the path and the time.

    Raises:
      DamagedExport: the file does not hold what it should; it is gone then.
    """
    # safetensors 0.8.0 writes the memory of an array, whatever its strides.
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    metadata = {"format": "pt"}  # which torch's readers ask for
    write_verified(path, arrays, lambda p, a: save_file(a, p, metadata), load_file)


def write_verified(
    path: Path,
    arrays: Arrays,
    save: Callable[[Path, Arrays], None],
    load: Callable[[Path], Arrays],
):
    """Save beside `path`, load, compare bit for bit, and only then take the name."""
    temporary = _beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save(temporary, arrays)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        _compare(load(temporary), arrays, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_run(
    run_dir: Path,
    config: TrainConfig,
    state: TrainState,
    *,
    class_names: tuple[str, ...],
    channels: int,
    progress: dict,
    report: dict | None = None,
):
    """A run directory with one checkpoint, which replaces a run in its place.

    Args:
      config: complete, as `data.prepare` leaves it.
      progress: fields of `train.Progress`, as far as they are not at their start.
      report: what report.json says; with it the run counts as finished, without it is resumed.
    """
    temporary, step = _beside(run_dir), int(state.step)
    document = {
        "progress": progress,
        "num_devices": 1,
        "config": to_dict(config),
        "class_names": list(class_names),
        "channels": channels,
        "improvement": False,
    }
    check_space(temporary, state)
    try:
        directory = RunDirectory(temporary)
        directory.write_config(config)
        _save_checkpoint(directory.checkpoints, step, state, document)
        if report:
            (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        directory.close()
        if run_dir.exists():
            RunDirectory(run_dir, overwrite=True).close()  # refuses a run that is going on
            shutil.rmtree(run_dir)
        temporary.rename(run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_checkpoint(directory, step, state, document):
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.save(step, state, document, improvement=False)
        back = checkpoints.restore(step, jax.eval_shape(lambda: state))
    finally:
        checkpoints.close()
    _compare(_leaves(back), _leaves(state), directory)


def _leaves(tree) -> Arrays:
    return {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(tree))}


def _compare(got: Arrays, expected: Arrays, path: Path):
    wrong = sorted(got.keys() ^ expected.keys()) or [
        name
        for name, array in expected.items()
        if (got[name].dtype, got[name].shape) != (array.dtype, array.shape)
        or got[name].tobytes() != array.tobytes()
    ]
    if wrong:
        raise DamagedExport(f"{path}: read back, {', '.join(wrong)} came out different")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
