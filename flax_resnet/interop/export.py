"""Writes weights, programs and run directories, each read back and compared before it is named."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save

from flax_resnet.config import TrainConfig, to_dict
from flax_resnet.files import replacing
from flax_resnet.interop import weights_to_run
from flax_resnet.interop.loaded_run import LoadedRun
from flax_resnet.runs.checkpoint import Checkpoints, check_space
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.owned import LOCK
from flax_resnet.text import listed
from flax_resnet.training.steps import TrainState
from flax_resnet.weights import convert

Arrays = dict[str, np.ndarray]
Program = Callable[[np.ndarray], np.ndarray]
"""Function from uint8 images `[B, H, W, C]` to logits `[B, K]`."""

PLATFORMS = ("cpu", "cuda", "tpu")
UNFOLDED = {"xla_disable_hlo_passes": "constant_folding"}
"""Compiler options for programs that are called a few times. Their weights are constants, and
folding those takes the compiler minutes and many lines of warnings."""

BATCH_SIZES = (1, 3)
"""Batch sizes with which an exported program is checked."""

ERROR_FACTOR = 8
ERROR_ULPS = 4
"""Bound on the error of an exported program, relative to float64: so many times the error of the
run's own program plus so many units in the last place. Both programs only round; their errors
differ by a factor of 2 or 3."""

ERROR_FLOAT64 = 1e-11
"""Bound on the relative error of a program exported from a float64 run."""


class DamagedExport(Exception):
    """Raised if a written file does not hold what it should."""


def write_safetensors(path: Path, arrays: Arrays):
    """Write a .safetensors file; the same arrays give the same bytes, whatever the path and the
    time.

    Raises:
      DamagedExport: the file does not hold the arrays; it is deleted then.
    """
    # safetensors 0.8.0 writes the memory of an array and ignores its strides.
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    metadata = {"format": "pt"}  # which torch's readers ask for
    write_verified(path, arrays, lambda p, a: p.write_bytes(save(a, metadata)), load_file)


def write_verified(
    path: Path,
    arrays: Arrays,
    save: Callable[[Path, Arrays], None],
    load: Callable[[Path], Arrays],
):
    """Save to a temporary file, load it, compare bit for bit, and rename it to `path`."""
    with replacing(path) as temporary:
        save(temporary, arrays)
        _compare(load(temporary), arrays, path)


def write_stablehlo(path: Path, served: LoadedRun, run: LoadedRun):
    """Write a serialised `jax.export.Exported` for CPU, CUDA and TPU, with normalisation and
    weights inside: uint8 images `[B, H, W, C]` of any B -> logits `[B, K]`.

    Args:
      served: the run to export: `run` or `run.without_batchnorm()`.
      run: the run to compare with.

    Raises:
      DamagedExport: as in `write_program`.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *served.image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(served.logits), platforms=PLATFORMS)(images)
    write_program(path, run, lambda p: p.write_bytes(exported.serialize()), _load_stablehlo)


def _load_stablehlo(path: Path) -> Program:
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return jax.jit(exported.call, compiler_options=UNFOLDED)


def write_program(
    path: Path, run: LoadedRun, save: Callable[[Path], object], load: Callable[[Path], Program]
):
    """Save to a temporary file, load it, compare its logits with the run's at several batch sizes,
    and rename it to `path`.

    Raises:
      DamagedExport: the logits are not those of the run; the file is deleted then.
    """
    with replacing(path) as temporary:
        save(temporary)
        program, random = load(temporary), np.random.default_rng(0)
        for size in BATCH_SIZES:
            images = random.integers(0, 256, (size, *run.image_shape), np.uint8)
            _compare_logits(np.asarray(program(images)), run, images, path)


def _compare_logits(got, run: LoadedRun, images, path: Path):
    own, exact = _logits(run, images), _exact_logits(run, images)
    if run.config.model.dtype == "float64":
        bound = ERROR_FLOAT64
    else:
        bound = ERROR_FACTOR * _distance(own, exact) + ERROR_ULPS * float(jnp.finfo(own.dtype).eps)
    distance = _distance(got, exact) if got.shape == exact.shape else np.inf
    if not distance <= bound:
        raise DamagedExport(
            f"{path}: read back, its logits for {len(images)} images have a relative error of"
            f" {distance:.1e}; rounding explains {bound:.1e}"
        )


def _exact_logits(run: LoadedRun, images) -> np.ndarray:
    """The logits of the run in float64."""
    arrays = convert.state_dict(run.network.to_model(run.variables))
    wide = replace(run.config, model=replace(run.config.model, dtype="float64"))
    with jax.enable_x64(True):
        exact = weights_to_run.as_run(arrays, wide, run.class_names, run.channels)
        return _logits(exact, images)


def _logits(run: LoadedRun, images) -> np.ndarray:
    return np.asarray(jax.jit(run.logits, compiler_options=UNFOLDED)(images))


def _distance(got, reference) -> float:
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def write_run(
    run_dir: Path,
    config: TrainConfig,
    state: TrainState,
    *,
    class_names: tuple[str, ...],
    channels: int,
    contents: dict,
    progress: dict,
    divided: dict | None = None,
    report: dict | None = None,
):
    """Write a run directory with one checkpoint; a run that is there is replaced.

    Args:
      config: the complete config, as `data.prepare` returns it.
      contents: facts about the training data (`data.prepare.contents`), or {}.
      progress: fields of `progress.Progress` that differ from their start.
      divided: fields that name and divide the data on which the weights were trained
        (`views.divided`); None: those of the config if there is progress.
      report: content of report.json, which makes the run a finished one; None: the run can be
        resumed.
    """
    temporary, step = _beside(Path(os.path.realpath(run_dir))), int(state.step)
    document = {
        "progress": progress,
        "num_devices": 1,
        "config": to_dict(config),
        "class_names": list(class_names),
        "channels": channels,
        "contents": contents,
        "improvement": False,
    }
    if divided is not None:
        document["divided"] = divided
    check_space(temporary, state)
    try:
        directory = RunDirectory(temporary)
        document["tables"] = directory.marks()
        directory.write_config(config)
        _save_checkpoint(directory.checkpoints, step, state, document)
        if report:
            directory.write_report(report)
        directory.close()
        _put_in_place(temporary, run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, run_dir: Path):
    """Rename a run. A run that is there is replaced inside its directory, which may be a link or
    somebody's working directory."""
    if not run_dir.exists():
        temporary.rename(run_dir)
        return
    directory = RunDirectory(run_dir, overwrite=True)  # refuses a run that is in use
    for entry in sorted(temporary.iterdir(), key=lambda entry: entry.name == "report.json"):
        if entry.name != LOCK:
            entry.rename(run_dir / entry.name)
    directory.close()


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
        raise DamagedExport(f"{path}: read back, {listed(wrong)} came out different")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
