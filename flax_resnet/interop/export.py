"""Weights and networks -> files and run directories: each is read again and compared before it has
its name."""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from flax_resnet.config import TrainConfig, to_dict
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
"""uint8 images `[B, H, W, C]` -> logits `[B, K]`."""

PLATFORMS = ("cpu", "cuda")
UNFOLDED = {"xla_disable_hlo_passes": "constant_folding"}
"""For programs that are called a few times: to compute with their weights beforehand, which are
constants here, takes the compiler minutes, and it says so in ten lines an instruction."""

BATCH_SIZES = (1, 3)
"""With which an exported program is called before it has its name."""

ERROR_FACTOR = 8
ERROR_ULPS = 4
"""Logits of an export may be this many times as far from float64 as those of the run's own program,
and a few units of the last place: both are right but for rounding, which differs by 2 or 3."""

ERROR_FLOAT64 = 1e-11
"""Where the run itself is float64."""


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
    with _replacing(path) as temporary:
        save(temporary, arrays)
        _compare(load(temporary), arrays, path)


def write_stablehlo(path: Path, served: LoadedRun, run: LoadedRun):
    """A serialised `jax.export.Exported`, for the CPU and CUDA: uint8 images `[B, H, W, C]` of any
    B -> logits `[B, K]`, normalisation and weights included.

    Args:
      served: what is written: `run`, or `run.without_batchnorm()`.

    Raises:
      DamagedExport: as `write_program`.
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
    """Save beside `path`, load, compare with the run at several batch sizes, and only then take the
    name.

    Raises:
      DamagedExport: the logits are not those of the run; the file is gone then.
    """
    with _replacing(path) as temporary:
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
            f"{path}: read back, its logits for {len(images)} images are {distance:.1e} from those"
            f" of the run, {bound:.1e} would be rounding"
        )


def _exact_logits(run: LoadedRun, images) -> np.ndarray:
    """Of the same run in float64."""
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
    progress: dict,
    report: dict | None = None,
):
    """A run directory with one checkpoint, which replaces a run in its place.

    Args:
      config: complete, as `data.prepare` leaves it.
      progress: fields of `progress.Progress`, as far as they are not at their start.
      report: what report.json says; with it the run counts as finished, without it is resumed.
    """
    temporary, step = _beside(Path(os.path.realpath(run_dir))), int(state.step)
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
    """Give a run its name. One that is there is replaced inside its directory, which may be a link
    or where somebody works."""
    if not run_dir.exists():
        temporary.rename(run_dir)
        return
    directory = RunDirectory(run_dir, overwrite=True)  # refuses a run that is going on
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


@contextlib.contextmanager
def _replacing(path: Path):
    """Yields the name of a file beside `path`, which takes its place unless the body fails."""
    temporary = _beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
