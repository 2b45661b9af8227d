"""Names of tensors: chooses the weights in a file and translates them to torchvision's names.

Nested mappings are flat here: `state_dict/module.conv1.weight` is in the mapping `state_dict`.
"""

import re
from collections import Counter
from typing import NamedTuple

from flax_resnet.errors import InputError
from flax_resnet.text import listed, printable

MOST_ENTRIES = 10_000
"""Most entries of a network; the largest network here has 932."""

# Matches the shortest prefix after which a name begins like that of a network here.
_ROOT = re.compile(
    r"(?P<prefix>(?:[^\n]*?[./])??)(?P<part>conv[1-3]|bn1|layer\d{1,2}|fc1?|linear|classifier\.1|"
    r"(?:resnet\.)?embedder|(?:resnet\.)?encoder\.stages)\."
)
_SEPARATOR = re.compile("[./]")
_LONGEST = 200
"""Characters of a name that are examined; the names of networks here have at most 70."""

_STAGES = re.compile(r"layer\d|.*encoder")
_BASIC_CNN = {"conv1", "conv2", "conv3", "fc1"}

_AVERAGED = re.compile(
    r"(^|[./_])(ema|swa|avg|averaged?|shadow|teacher|target|momentum|encoder_k)[./_]", re.IGNORECASE
)
_CONTRASTIVE = re.compile(r"(^|[./])encoder_[qk]\.$")

# (pattern of another project's name, its replacement); timm uses torchvision's names.
_DIALECTS = [
    # pytorch-cifar and its descendants
    (r"\bshortcut\.(\d)\.", r"downsample.\1."),
    (r"^linear\.", "fc."),
    # Hugging Face ResNetForImageClassification
    (r"^resnet\.", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d{1,2})\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
    (r"\bshortcut\.convolution\.", "downsample.0."),
    (r"\bshortcut\.normalization\.", "downsample.1."),
    (r"\blayer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}."),
    (r"\blayer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}."),
    (r"^classifier\.1\.", "fc."),
]


class Choice(NamedTuple):
    """The weights chosen among a file's entries; `str` gives the remark for the user."""

    arrays: dict
    """The weights under torchvision's names."""

    key: str
    """Key of the mapping that holds them."""

    prefix: str
    """Prefix that was removed from their names."""

    left_out: list[str]
    """Other entries, except those of other networks."""

    averaged: list[str]
    """Averages of the same network that were not chosen."""

    headless: bool
    """True if a projection head, which is no classifier, was left out."""

    def __str__(self):
        dropped = f"prefix {printable(self.prefix)!r} dropped" if self.prefix else ""
        head = "the projection head (fc) left out" if self.headless else ""
        left = f"left out: {listed(self.left_out)}" if self.left_out else ""
        average = f"averaged weights are under {listed(self.averaged)}: `ema` takes them"
        parts = [f"under {printable(self.key)!r}" if self.key else "", dropped, head, left]
        return "; ".join(filter(None, [*parts, average if self.averaged else ""]))


def choose(arrays: dict, key: str | None = None, *, ema: bool = False) -> Choice:
    """Choose the weights among a file's entries.

    Args:
      arrays: any values under the names of a file.
      key: key or prefix of the network, such as `state_dict` or `encoder_k`; None if there is one.
      ema: whether to take the averaged weights of a file that has raw ones too.

    Raises:
      InputError: there are several networks, or none under this key.
    """
    prefixes = _networks(arrays)
    chosen = _one(prefixes, key, ema) if prefixes or key or ema else ""
    others = [prefix for prefix in prefixes if prefix != chosen]
    within = {prefix for prefix in others if prefix.startswith(chosen)}
    own = [n for n in arrays if n.startswith(chosen) and not _begins(n, within)]
    if len(own) > MOST_ENTRIES:
        raise InputError(f"{len(own):,} entries are more than any network here has")
    taken = {name.removeprefix(chosen): arrays[name] for name in own}
    headless = bool(_CONTRASTIVE.search(chosen)) and any(n.startswith("fc.") for n in taken)
    taken = {n: a for n, a in taken.items() if not (headless and n.startswith("fc."))}
    where, slash, prefix = chosen.rpartition("/")
    networks = {chosen, *others}
    rest = (n for n in arrays if not _begins(n, networks))
    left_out = dict.fromkeys(name.removeprefix(where + slash).partition("/")[0] for name in rest)
    average = [_shown(p) for p in others if _is_average(p) and not _is_average(chosen)]
    return Choice(translated(taken), where, prefix, list(left_out), average, headless)


def without_prefix(arrays: dict) -> dict:
    """The entries without the prefix of the network; other entries keep their names."""
    prefix = next(iter(_networks(arrays)), "")
    short = {name: name.removeprefix(prefix) for name in arrays}
    # Two entries that would get the same name keep theirs.
    return {name if short[name] in arrays else short[name]: a for name, a in arrays.items()}


def translated(arrays: dict) -> dict:
    """The arrays under torchvision's names, converted from any naming scheme.

    Raises:
      InputError: two arrays get the same name.
    """
    names = {}
    for name in arrays:
        names.setdefault(_translate(name), []).append(name)
    if twice := [" and ".join(map(printable, same)) for same in names.values() if len(same) > 1]:
        raise InputError(f"weights given twice: {listed(twice)}")
    return {name: arrays[same[0]] for name, same in names.items()}


def _networks(names) -> list[str]:
    """The prefixes of the networks in a file, those with most entries first."""
    counts, parts = Counter(), {}
    for name in names:
        if m := _ROOT.match(name[:_LONGEST]):
            counts[m["prefix"]] += 1
            parts.setdefault(m["prefix"], set()).add(m["part"])
    ours = {
        p for p, of_it in parts.items() if _BASIC_CNN <= of_it or any(map(_STAGES.match, of_it))
    }
    return [prefix for prefix, _ in counts.most_common() if prefix in ours]


def _begins(name: str, prefixes: set[str]) -> bool:
    """True if the name begins with one of these prefixes of networks. Each ends with a separator,
    so that the time does not depend on their number."""
    ends = (match.end() for match in _SEPARATOR.finditer(name[:_LONGEST]))
    return "" in prefixes or any(name[:end] in prefixes for end in ends)


def _one(prefixes: list[str], key: str | None, ema: bool) -> str:
    """The prefix of the network to take; InputError if none fits or several do."""
    if key is not None:
        wanted = key.replace("/", ".").rstrip(".")
        found = [p for p in prefixes if f".{wanted}." in f".{_shown(p)}."]
        if not found:
            where = f"; there are {_places(prefixes)}" if prefixes else ""
            raise InputError(f"`weights_key`: no network under {printable(key)!r}{where}")
        prefixes = found
    kinds = {kind: [p for p in prefixes if _is_average(p) == kind] for kind in (False, True)}
    if ema and not kinds[True]:
        raise InputError(f"`ema`: no averaged weights; there are {_places(prefixes)}")
    left = kinds[ema] or kinds[not ema]
    if len(left) > 1:
        raise InputError(f"several networks: {_places(left)}; choose one with `weights_key` KEY")
    return left[0]


def _is_average(prefix: str) -> bool:
    return bool(_AVERAGED.search(prefix))


def _places(prefixes: list[str]) -> str:
    return listed(_shown(p) or "those without a prefix" for p in prefixes) or "none"


def _shown(prefix: str) -> str:
    return prefix.replace("/", ".").rstrip(".")


def _translate(name: str) -> str:
    if len(name) > _LONGEST:
        return name
    for pattern, replacement in _DIALECTS:
        name = re.sub(pattern, replacement, name)
    return name
