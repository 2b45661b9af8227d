"""The names in a run directory that a run writes, and so may replace or delete."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flax_resnet.errors import LOG, InputError
from flax_resnet.text import listed

LOCK = "run.lock"
DIGESTS = "SHA256SUMS"
RESULTS = ("per_class.csv", "curves.png", "confusion_matrix.png", "reliability.png")

_OF_A_STEP = r"""(
    _CHECKPOINT_METADATA | commit_success\.txt | manifest\.json(\.tmp)?
  | document | metadata | metrics | state | _METADATA | _sharding | manifest\.ocdbt
  | array_metadatas | process_[0-9]+ | ocdbt\.process_[0-9]+ | d | [0-9a-f]{32}
)(\.orbax-checkpoint-tmp[^/]* | \.__lock)?"""

_OWN = re.compile(
    rf"""
    run\.lock | SHA256SUMS | {re.escape(LOG)}
  | (config|report)\.json | (metrics|timings|per_class)\.csv
  | (SHA256SUMS|config|report|metrics|timings|per_class)\.tmp
  | (curves|confusion_matrix|reliability)\.(png|tmp) | events\.out\.tfevents\.[^/]+
  | plugins | plugins/profile(/[0-9_]+(/[^/]+\.(xplane\.pb|trace\.json\.gz))?)?
  | checkpoints | checkpoints/(metrics|timings)\.(csv|tmp)
  | checkpoints/[0-9]+(\.orbax-checkpoint-tmp[^/]*)?(/{_OF_A_STEP})*
    """,
    re.VERBOSE,
)
"""Matches the path, inside the run directory, of every file and folder that a run writes."""


def foreign(directory: Path, prefix: str = "") -> list[str]:
    """The paths below `directory`, which is `prefix` in the run directory, that no run writes.
    Links are not followed, and the content of a foreign folder is not listed."""
    return [name for name, _ in _entries(directory, prefix) if not _OWN.fullmatch(name)]


def clear(run_dir: Path):
    """Delete the files of a run except its lock. Symbolic links are deleted, not their targets.

    Raises:
      InputError: the directory holds files that no run writes; nothing is deleted then.
    """
    if strangers := foreign(run_dir):
        raise InputError(
            f"{run_dir} holds files that no run has written: {listed(strangers)}; nothing was"
            " deleted"
        )
    # Deepest first and config.json last, so that an interrupted deletion leaves a run to delete.
    for name, entry in sorted(_entries(run_dir), key=lambda e: (e[0] == "config.json", -len(e[0]))):
        if entry.is_dir(follow_symlinks=False):
            os.rmdir(entry.path)
        elif name != LOCK:
            os.unlink(entry.path)


def _entries(directory: Path | str, prefix: str = "") -> Iterator[tuple[str, os.DirEntry]]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        name = prefix + entry.name
        yield name, entry
        if entry.is_dir(follow_symlinks=False) and _OWN.fullmatch(name):
            yield from _entries(entry.path, name + "/")
