"""Checkpoints: Orbax, with what it does not do by itself.

One step directory holds the whole state and a JSON document (data position, early stopping,
config, class names, digests of the tables), committed atomically. Around it:

- a SHA-256 of every file, checked before anything is read (a flipped byte restores silently);
- written in the background from a copy on the host, so that a step never waits for the disk; an
  error of the writing is raised at the next step;
- the latest and the best are both kept, and only an improvement can be the best;
- a damaged step is passed over for the newest sound one, and the reader is told;
- names, shapes and types are compared before anything is loaded.
"""

import errno
import functools
import hashlib
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
from flax_resnet.errors import InputError
from flax_resnet.runs.owned import foreign
from flax_resnet.text import listed, printable

_MANIFEST = "manifest.json"
_DOCUMENT = "document/metadata"
_UNKNOWN = -1  # step
_NAME = re.compile("0|[1-9][0-9]*")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path | str, *, say: Callable[[str], None] = print):
        self.directory = Path(directory).absolute()
        _quieten()
        self._say, self._said = say, set()
        self._damage = functools.cache(damage)  # until the next save: a check reads every file
        # Which steps to keep is decided here: Orbax forgets which is the best when a run goes on,
        # or has it in a file of its own, and opens no run where that is damaged.
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

        The state is copied first: the caller may donate it at once.

        Raises:
          OSError: the save before this one failed.
          InputError: something that no run has written has the name of the step.
        """
        self.wait()
        self._damage.cache_clear()
        if step in steps_in(self.directory):
            if not improvement:
                return  # the state of a step is what it is
            self._delete(step)  # saved before anybody knew that it is the best
        elif os.path.lexists(place := self.directory / str(step)):
            raise InputError(f"{place} is where a checkpoint has to be, and no run has written it")
        if improvement:
            self._best = step
        elif self._best == _UNKNOWN:
            self._best = self._newest_sound(_improved)
        if not _is_all_here(state):  # every process writes its part, and they have to meet
            return self._write(step, state, document)
        state = jax.tree.map(lambda x: np.array(x, copy=True), state)
        self._writing = self._writer.submit(self._write, step, state, document)

    def check(self):
        """Raises the error of a save that has failed since it began; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self):
        """Wait for the save that is being written; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step, state, document):
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_flatten(state)),
            document=ocp.args.JsonSave(finite(document | {"step": step})),
        )
        try:
            # Without `force` Orbax saves nothing below the highest number among the folders.
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        except ValueError as error:
            if fault := _fault_of_the_disk(str(error)):
                raise OSError(fault, os.strerror(fault).lower(), str(self.directory)) from None
            raise
        if distributed.is_first():
            _write_manifest(self.directory / str(step))
        distributed.meet(f"checkpoint {step}")
        for old in steps_in(self.directory)[:-2]:
            if old != self._best and not self._foreign(old):
                self._delete(old)

    def delete_after(self, step: int | None):
        """Delete the steps later than the one that a run goes on from (None: all of them): they
        are damaged, and the run will come to them again.

        Raises:
          InputError: there is something in them that no run has written.
        """
        self.wait()
        for later in steps_in(self.directory):
            if step is None or later > step:
                if strangers := self._foreign(later):
                    raise InputError(
                        f"{self.directory / str(later)} is to be written anew and holds what no"
                        f" run has written: {listed(strangers)}"
                    )
                self._delete(later)

    def _foreign(self, step: int) -> list[str]:
        return foreign(self.directory / str(step), f"checkpoints/{step}/")

    def _delete(self, step: int):
        path = self.directory / str(step)
        if step in self._manager.all_steps() and not path.is_symlink():
            self._manager.delete(step)
        elif distributed.is_first():  # Orbax does not know what is left of it, or follows the link
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
            self._manager.reload()

    def latest(self) -> int | None:
        """The newest step whose files are as they were written."""
        return self._newest_sound(lambda document: True)

    def best(self) -> int | None:
        """The step of the best weights, or the latest where none was marked."""
        best = self._newest_sound(_improved)
        return self.latest() if best is None else best

    def document(self, step: int) -> dict:
        """The JSON document of a step."""
        self.wait()
        return _document(self.directory / str(step))

    def restore(self, step: int, like):
        """The state of a step, in the structure, shapes and types of `like`.

        It comes to where `like` says (`jax.ShapeDtypeStruct.sharding`), by default to this
        process's first device: how many wrote it does not matter.

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
        """Finish writing and let go of Orbax's threads; an error nobody asked for is dropped."""
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
def _quieten():
    """What is raised or told in a line here is not printed with a traceback as well: Orbax logs it,
    and after the first of several failed writes the others find their event loop closed."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    print_traceback = sys.unraisablehook

    def unless_closed(seen):
        if "Event loop is closed" not in str(seen.exc_value):
            print_traceback(seen)

    sys.unraisablehook = unless_closed


def steps_in(directory: Path) -> list[int]:
    """The steps that lie in a directory of checkpoints, sound or not; a folder that is called like
    a step and has nothing of a checkpoint in it is none."""
    named = [path for path in directory.glob("*") if _NAME.fullmatch(path.name)]
    return sorted(int(path.name) for path in named if _is_step(path))


def _is_step(directory: Path) -> bool:
    try:
        names = {path.name for path in directory.iterdir()}
    except NotADirectoryError:
        return False
    except OSError:  # what it holds cannot be read, which `damage` says
        return True
    return not names.isdisjoint((_MANIFEST, "state", "document", "_CHECKPOINT_METADATA"))


def newest_document(directory: Path, say: Callable[[str], None]) -> dict | None:
    """The JSON document of the newest sound step, without opening the checkpoints for writing;
    None where there is none. Damaged steps are said."""
    step = _newest_sound(directory, lambda document: True, say, damage)
    return None if step is None else _document(directory / str(step))


def _newest_sound(directory: Path, wanted, say, damage_of) -> int | None:
    for path in sorted(directory.glob("*")):
        if (path / _MANIFEST).is_file() and not _NAME.fullmatch(path.name):
            say(f"{printable(path)} passed over: a checkpoint has the number of its step as name")
    for step in reversed(steps_in(directory)):
        if fault := damage_of(directory / str(step)):
            say(f"checkpoint of step {step} passed over: {fault}")
        elif wanted(_document(directory / str(step))):
            return step
    return None


def _document(directory: Path) -> dict:
    return json.loads((directory / _DOCUMENT).read_bytes())


def _fault_of_the_disk(text: str) -> int | None:
    """The errno that TensorStore has made a text of: a full disk, a quota, a limit of file size."""
    return next((code for code in errno.errorcode if os.strerror(code) in text), None)


def check_space(directory: Path, state):
    """Raises InputError unless there is room for two checkpoints of `state` (arrays or shapes).

    Two, because the next one is complete before the last one goes.
    """
    needed = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{directory}: no space left: checkpoints need {needed / 1e6:,.0f} MB,"
            f" {free / 1e6:,.0f} MB are free"
        )


def _improved(document: dict) -> bool:
    return document.get("improvement", False)


def _described(leaf) -> jax.ShapeDtypeStruct:
    place = getattr(leaf, "sharding", None)
    place = place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _is_all_here(state) -> bool:
    """Whether this process can read every array."""
    return all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(state))


def _flatten(tree) -> dict:
    # Orbax turns tuples and integer keys into strings on the way back; names survive.
    return {_name(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _files(directory: Path) -> dict[str, Path]:
    """{name: file} below a step directory, but for its manifest and hidden ones (desktops and NFS
    leave such behind, a checkpoint has none)."""
    files = (path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in sorted(files)}
    return {n: p for n, p in names.items() if n != _MANIFEST and not p.name.startswith(".")}


def _write_manifest(directory: Path):
    digests = {name: _sha256(path) for name, path in _files(directory).items()}
    temporary = directory / (_MANIFEST + ".tmp")
    temporary.write_text(json.dumps(digests, indent=1))
    os.replace(temporary, directory / _MANIFEST)


def damage(directory: Path) -> str | None:
    """What is wrong with a step directory, or None."""
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
        if _sha256(path) != digests[name]:
            return f"{name} is damaged"
    return None


def _of_another_step(directory: Path) -> str | None:
    """A checkpoint was copied or renamed; those of earlier versions do not know their step."""
    step = _document(directory).get("step", directory.name)
    return None if str(step) == directory.name else f"it was written as that of step {step}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
