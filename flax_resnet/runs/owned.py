"""Which names in a run directory a run has written, and so may replace or delete."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from flax_resnet.errors import LOG, InputError
from flax_resnet.text import listed

LOCK = "run.lock"
DIGESTS = "SHA256SUMS"
RESULTS = ("per_class.csv", "curves.png", "confusion_matrix.png")

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
  | (curves|confusion_matrix)\.png | events\.out\.tfevents\.[^/]+
  | checkpoints | checkpoints/(metrics|timings)\.(csv|tmp)
  | checkpoints/[0-9]+(\.orbax-checkpoint-tmp[^/]*)?(/{_OF_A_STEP})*
    """,
    re.VERBOSE,
)
"""Everything that a run writes, by its path inside the run directory."""


def foreign(directory: Path, prefix: str = "") -> list[str]:
    """What no run has written: paths below `directory`, which lies at `prefix` in the run
    directory. Links are not followed, nor is what lies in a foreign folder listed."""
    return [name for name, _ in _entries(directory, prefix) if not _OWN.fullmatch(name)]


def clear(run_dir: Path):
    """Delete a run, but for its lock. Symbolic links are deleted and what they point at is not.

    Raises:
      InputError: something there is not of a run; nothing has been deleted then.
    """
    if strangers := foreign(run_dir):
        raise InputError(
            f"{run_dir} holds what no run has written: {listed(strangers)}; nothing was deleted"
        )
    # Deepest first, and config.json last: what is left is a run as long as it is there.
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
