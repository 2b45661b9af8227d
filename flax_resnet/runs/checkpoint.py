"""Checkpoints, written by Orbax and guarded against damage.

A step directory holds the whole state and a JSON document (data position, early stopping, config,
class names, digests of the tables), committed atomically. This module adds:

- a SHA-256 of every file, checked before anything is read, because Orbax restores a flipped byte
  silently;
- writing in the background from a copy on the host, so that a step never waits for the disk; an
  error of the writing is raised at the next step;
- retention of the two latest checkpoints and the best one, which only an improvement can be;
- a fallback from a damaged step to the newest sound one, with a message;
- a comparison of names, shapes and types before anything is loaded.
"""

import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_resnet.config import finite
from flax_resnet.devices import distributed
from flax_resnet.errors import FAULTS_OF_PLACE, InputError
from flax_resnet.files import sha256
from flax_resnet.runs.owned import foreign
from flax_resnet.text import listed, printable, say

_MANIFEST = "manifest.json"
_DOCUMENT = "document/metadata"
_UNKNOWN = -1  # instead of a step
_NAME = re.compile("0|[1-9][0-9]*")


def check_place(directory: Path | str):
    """Raises InputError for a path that Orbax or TensorStore takes for another one: they would
    write there."""
    path = os.path.abspath(directory)
    if "\\" in path or "gs:/" in f"{path}/" or path != _as_utf8(path):
        raise InputError(
            f"{printable(path)}: checkpoints cannot lie in a folder whose name has a backslash,"
            " ends with gs: or is not in UTF-8; rename it"
        )


def _as_utf8(path: str) -> str:
    return path.encode(errors="replace").decode()


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path | str, *, say: Callable[[str], None] = say):
        check_place(directory)
        self.directory = Path(directory).absolute()
        _quieten()
        self._say, self._said = say, set()
        self._damage = functools.cache(damage)  # a check reads every file; a save clears the cache
        # This class decides which steps to keep. Orbax forgets the best one when a run is resumed,
        # or keeps it in a file without which it opens no run.
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "document": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._best: int | None = _UNKNOWN

    def save(self, step: int, state, document: dict, *, improvement: bool):
        """Begin to write one step; `improvement` marks it as the best so far.

        The state is copied first, so that the caller may donate it at once.

        Raises:
          OSError: the previous save failed.
          InputError: a file or folder that no run has written has the name of the step.
        """
        self.wait()
        self._damage.cache_clear()
        if step in steps_in(self.directory):
            if not improvement and not self._is_outdated(step, document):
                return  # the same is saved already
            distributed.barrier(f"replace {step}")  # every process has read the old one
            self._delete(step)  # it was saved before the evaluation of its epoch
        elif os.path.lexists(place := self.directory / str(step)):
            raise InputError(f"{place} has the name of a checkpoint, and no run has written it")
        if improvement:
            self._best = step
        elif self._best == _UNKNOWN:
            self._best = self._newest_sound(_improved)
        if not _is_addressable(state):  # every process writes its part and waits at a barrier
            return self._write(step, state, document)
        state = jax.tree.map(lambda x: np.array(x, copy=True), state)
        self._writing = self._writer.submit(self._write, step, state, document)

    def check(self):
        """Raise the error of a background save that has failed; does not wait for one."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self):
        """Wait for the background save, if any, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step, state, document):
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_flatten(state)),
            document=ocp.args.JsonSave(finite(document | {"step": step})),
        )
        try:
            # Without `force` Orbax skips steps below the highest number among the folders.
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        except ValueError as error:
            if fault := _fault_of_the_disk(str(error)):
                raise OSError(fault, os.strerror(fault).lower(), str(self.directory)) from None
            raise
        if distributed.is_first():
            _write_manifest(self.directory / str(step))
        distributed.barrier(f"checkpoint {step}")
        for old in steps_in(self.directory)[:-2]:
            if old != self._best and not self._foreign(old):
                self._delete(old)

    def _is_outdated(self, step: int, document: dict) -> bool:
        """True if a step was saved at the end of its epoch, and this document after it."""
        sound = self._damage(self.directory / str(step)) is None
        return sound and _epoch(self.document(step)) < _epoch(document)

    def delete_after(self, step: int | None):
        """Delete the steps after the one that a run resumes from (None: all), which are damaged and
        will be written again.

        Raises:
          InputError: one of them holds files that no run has written.
        """
        self.wait()
        for later in steps_in(self.directory):
            if step is None or later > step:
                if strangers := self._foreign(later):
                    raise InputError(
                        f"{self.directory / str(later)} has to be replaced but holds files that no"
                        f" run has written: {listed(strangers)}"
                    )
                self._delete(later)

    def _foreign(self, step: int) -> list[str]:
        return foreign(self.directory / str(step), f"checkpoints/{step}/")

    def _delete(self, step: int):
        path = self.directory / str(step)
        if step in self._manager.all_steps() and not path.is_symlink():
            self._manager.delete(step)
        elif distributed.is_first():  # Orbax does not see a partial step, and would follow a link
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
            self._manager.reload()

    def latest(self) -> int | None:
        """The newest undamaged step."""
        return self._newest_sound(lambda document: True)

    def best(self) -> int | None:
        """The step of the best weights, or the latest step if none was marked as best."""
        best = self._newest_sound(_improved)
        return self.latest() if best is None else best

    def document(self, step: int) -> dict:
        """The JSON document of a step."""
        self.wait()
        return _document(self.directory / str(step))

    def restore(self, step: int, like):
        """The state of a step, in the structure, shapes and types of `like`.

        The arrays are placed by the shardings of `like`, by default on the first device of this
        process, whatever the number of devices that wrote them.

        Raises:
          InputError: names, shapes or types differ; nothing is loaded then.
        """
        self.wait()
        template = _flatten(jax.tree.map(_described, like))
        self._check(step, template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        arrays = self._manager.restore(step, args=args)["state"]
        leaves, structure = jax.tree.flatten_with_path(like)
        return jax.tree.unflatten(structure, [arrays[_name(path)] for path, _ in leaves])

    def close(self):
        """Finish writing and end Orbax's threads; pending write errors are ignored."""
        self._writer.shutdown()
        self._manager.close()

    def _newest_sound(self, wanted) -> int | None:
        self.wait()
        return _newest_sound(self.directory, wanted, self._say_once, self._damage)

    def _say_once(self, line: str):
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _check(self, step, template):
        stored = self._manager.item_metadata(step)["state"]
        stored = {name: (tuple(m.shape), np.dtype(m.dtype)) for name, m in stored.items()}
        expected = {name: (tuple(s.shape), np.dtype(s.dtype)) for name, s in template.items()}
        faults = [f"{n} is missing" for n in sorted(expected.keys() - stored.keys())]
        faults += [f"{n} is unknown" for n in sorted(stored.keys() - expected.keys())]
        faults += [
            f"{n} is {stored[n][0]} {stored[n][1]} instead of {expected[n][0]} {expected[n][1]}"
            for n in sorted(expected.keys() & stored.keys())
            if stored[n] != expected[n]
        ]
        if faults:
            raise InputError(f"checkpoint of step {step} does not fit: {'; '.join(faults)}")


@functools.cache
@functools.cache
def _quieten():
    """Silence tracebacks of errors that this module raises or reports in a line: Orbax logs them,
    and after a failed write its other writes complain, also at the end of the process, about a
    closed event loop or an error that nobody has read."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    print_traceback = sys.unraisablehook

    def unless_closed(seen):
        if "Event loop is closed" not in str(seen.exc_value):
            print_traceback(seen)

    sys.unraisablehook = unless_closed


def steps_in(directory: Path) -> list[int]:
    """The steps in a directory of checkpoints, sound or damaged. A folder that has the name of a
    step but no file of a checkpoint is ignored."""
    named = [path for path in directory.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(int(path.name) for path in named if _is_step(path))


def _is_step(directory: Path) -> bool:
    try:
        names = {path.name for path in directory.iterdir()}
    except NotADirectoryError:
        return False
    except OSError:  # it cannot be read, which `damage` reports
        return True
    return not names.isdisjoint((_MANIFEST, "state", "document", "_CHECKPOINT_METADATA"))


def newest_document(directory: Path, say: Callable[[str], None]) -> dict | None:
    """The JSON document of the newest sound step, or None; nothing is opened for writing. Damaged
    steps are reported to `say`."""
    step = _newest_sound(directory, lambda document: True, say, damage)
    return None if step is None else _document(directory / str(step))


def _newest_sound(directory: Path, wanted, say, damage_of) -> int | None:
    for path in sorted(directory.glob("*")):
        if (path / _MANIFEST).is_file() and not _NAME.fullmatch(path.name):
            say(f"{printable(path)} passed over: a checkpoint is named by its step")
    for step in reversed(steps_in(directory)):
        if fault := damage_of(directory / str(step)):
            say(f"checkpoint of step {step} passed over: {fault}")
        elif wanted(_document(directory / str(step))):
            return step
    return None


def _document(directory: Path) -> dict:
    return json.loads((directory / _DOCUMENT).read_bytes())


def _fault_of_the_disk(text: str) -> int | None:
    """The errno in a message of TensorStore, such as a full disk, a quota or a file size limit;
    not that of a lost connection to another process."""
    return next((code for code in FAULTS_OF_PLACE if os.strerror(code) in text), None)


def check_space(directory: Path, state, kept: int = 0):
    """Raises InputError unless there is room for two checkpoints of `state` (arrays or shapes): the
    next one is complete before the last one is deleted.

    Args:
      kept: number of checkpoints that are there already.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed = max(2 - kept, 1) * size
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{directory}: no space left: checkpoints need {needed / 1e6:,.0f} MB,"
            f" {free / 1e6:,.0f} MB are free"
        )


def _epoch(document: dict) -> int:
    return document.get("progress", {}).get("epoch", 0)


def _improved(document: dict) -> bool:
    return document.get("improvement", False)


def _described(leaf) -> jax.ShapeDtypeStruct:
    place = getattr(leaf, "sharding", None)
    place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _is_addressable(state) -> bool:
    """True if this process can read every array."""
    return all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(state))


def _flatten(tree) -> dict:
    # Orbax restores tuples and integer keys as strings; names are restored as they were.
    return {_name(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _files(directory: Path) -> dict[str, Path]:
    """{name: file} below a step directory, without its manifest and without hidden files, which
    desktops and NFS create but no checkpoint has."""
    files = (path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in sorted(files)}
    return {n: p for n, p in names.items() if n != _MANIFEST and not p.name.startswith(".")}


def _write_manifest(directory: Path):
    digests = {name: sha256(path) for name, path in _files(directory).items()}
    temporary = directory / (_MANIFEST + ".tmp")
    temporary.write_text(json.dumps(digests, indent=1, allow_nan=False))
    os.replace(temporary, directory / _MANIFEST)


def damage(directory: Path) -> str | None:
    """The fault of a step directory in a few words, or None if it is sound."""
    try:
        if not (directory / _MANIFEST).is_file():
            return "its manifest is missing (the save was cut off)"
        digests = json.loads((directory / _MANIFEST).read_bytes())
        return _difference(digests, _files(directory)) or _of_another_step(directory)
    except (ValueError, RecursionError):
        return "its manifest is damaged"
    except OSError as error:
        return f"{Path(error.filename or directory).name} cannot be read: {error.strerror}"


def _difference(digests: dict, files: dict[str, Path]) -> str | None:
    if not isinstance(digests, dict):
        raise ValueError
    for name in sorted({*digests, _DOCUMENT} - files.keys()):
        return f"{printable(name)} is missing"
    for name in sorted(files.keys() - digests.keys()):
        return f"{printable(name)} does not belong to it"
    for name, path in files.items():
        if sha256(path) != digests[name]:
            return f"{name} is damaged"
    return None


def _of_another_step(directory: Path) -> str | None:
    """The fault of a checkpoint that was copied or renamed, or None; checkpoints of earlier
    versions do not hold their step."""
    step = _document(directory).get("step", directory.name)
    return None if str(step) == directory.name else f"it was written as that of step {step}"
