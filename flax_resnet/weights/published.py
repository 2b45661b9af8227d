"""Finds published weights by name: torchvision's, timm's and others of the Hugging Face Hub, URLs.

What is downloaded lies in the folders of torch.hub and of huggingface_hub, which share it with
PyTorch, and nowhere else. A file gets its name when it is complete and has its checksum.
"""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from flax_resnet.config import nearest
from flax_resnet.errors import InputError, extra_needed
from flax_resnet.files import sha256
from flax_resnet.libraries import check_home, quiet
from flax_resnet.models import list_models
from flax_resnet.text import printable
from flax_resnet.weights import files

_SECONDS = 30  # a server that says nothing for so long has no answer

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_NETWORK = {
    "architecture": (None, *list_models()),  # timm's
    "global_pool": (None, "avg"),
    "model_args": (None, {}),
    "hidden_act": (None, "relu"),  # transformers'
    "downsample_in_first_stage": (None, False),
    "downsample_in_bottleneck": (None, False),
}
"""{key of a config.json: its values for networks that are here}"""

_SQUASHED = 384
"""From this size on, transformers' ConvNextImageProcessor cuts nothing off an image."""

_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, in files of transformers


class Found(NamedTuple):
    """A file of weights, and what its publisher says about them."""

    path: Path

    data: dict = {}
    """Fields of `DataConfig`: mean, std, sizes and interpolation; {} if they are unknown."""

    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits; () if they are unknown."""


def is_name(source: str) -> bool:
    """True if weights are named, rather than a path: torchvision:, timm:, hf: or a URL."""
    return source.partition(":")[0] in _FINDERS


def find(source: str, say: Callable[[str], object]) -> Found:
    """The weights of a name, from the cache or the network.

    Args:
      source: `torchvision:ARCH[:WEIGHTS]`, `timm:NAME`, `hf:OWNER/REPO` or a URL.
      say: is told in a line which file was taken.

    Raises:
      InputError: there are none of this name, the network gives no answer, or what it gives is
        damaged or no weights.
    """
    scheme, _, rest = source.partition(":")
    found = _FINDERS[scheme](source, rest)
    names = tuple(normalize("NFC", name) for name in found.class_names)
    say(f"{source}: {found.path}")
    return found._replace(class_names=names)


def _from_torchvision(source: str, name: str) -> Found:
    arch, _, version = name.partition(":")
    models = _package("torchvision.models", source)
    published = [name for name in list_models() if name in models.list_models()]
    if arch not in published:
        raise InputError(f"{source}: unknown network {arch!r}{nearest(arch, published)}")
    versions = models.get_model_weights(arch).__members__  # DEFAULT is one of them
    if (version or "DEFAULT") not in versions:
        raise InputError(f"{source}: unknown weights {version!r}{nearest(version, versions)}")
    weights = versions[version or "DEFAULT"]
    looks = weights.transforms()
    data = {
        "mean": tuple(looks.mean),
        "std": tuple(looks.std),
        "image_size": looks.crop_size[0],
        "resize_size": looks.resize_size[0],
        "interpolation": looks.interpolation.value,
    }
    path = _from_url(weights.url, weights.url.partition(":")[2]).path
    return Found(path, data, tuple(weights.meta["categories"]))


def _from_timm(source: str, name: str) -> Found:
    """timm keeps its weights on the Hub; the name of a network alone stands for its default."""
    if "." not in name:
        models = _package("timm.models", source)
        default = models.get_pretrained_cfg(name) if models.is_model(name) else None
        if default is None or not default.tag:
            raise InputError(f"{source}: timm has no weights of this name")
        name = f"{name}.{default.tag}"
    return _from_hub(source, f"timm/{name}")


def _from_hub(source: str, repo: str) -> Found:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{source}: the Hub's names are OWNER/REPO")
    paths = (_hub_file(source, repo, name) for name in _HUB_FILES)
    path = next(filter(None, paths), None)
    if path is None:
        raise InputError(f"{source}: it has none of the files {', '.join(_HUB_FILES)}")
    _check_blob(source, path)
    read = lambda name: _json(source, _hub_file(source, repo, name))  # noqa: E731
    config = read("config.json")
    _check_network(source, config, path)
    try:
        data = _data_of_timm(config) or _data_of_transformers(read("preprocessor_config.json"))
        return Found(path, data, _names_in(config))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{source}: its config.json is not understood: {error!r}") from None


def _check_network(source: str, config: dict, path: Path):
    """Raises InputError for another network, which may have the names and shapes of one that is
    here: a pooling or a stride has no weights."""
    for key, values in _NETWORK.items():
        if (own := config.get(key)) not in values:
            raise InputError(
                f"{source}: its {key} {printable(repr(own))} is of no network here; to take the"
                f" weights all the same, give {path}"
            )


def _data_of_timm(config: dict) -> dict:
    looks = config.get("pretrained_cfg")
    if looks is None:
        return {}
    size = looks["input_size"][1]
    if (mode := looks.get("crop_mode", "center")) != "center":
        raise ValueError(f"crop_mode {mode!r}")
    return {
        "mean": tuple(looks["mean"]),
        "std": tuple(looks["std"]),
        "image_size": size,
        "resize_size": math.floor(size / looks.get("crop_pct", 1)),  # as timm rounds it
        "interpolation": looks.get("interpolation", "bilinear"),
    }


def _data_of_transformers(images: dict) -> dict:
    if "image_mean" not in images:
        return {}
    size, share = _side(images["size"]), images.get("crop_pct")
    if share and size >= _SQUASHED:
        raise ValueError(f"images of {size} pixels lose their proportions")
    resize_size = int(size / (share or 1))  # as transformers rounds it
    if images.get("crop_size") and images.get("do_center_crop", True):
        size = _side(images["crop_size"], crop=True)
    if not all(images.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize")):
        raise ValueError("images are not resized, rescaled or normalised")
    return {
        "mean": tuple(images["image_mean"]),
        "std": tuple(images["image_std"]),
        "image_size": size,
        "resize_size": resize_size,
        "interpolation": _FILTERS[images.get("resample", 2)],
    }


def _side(size: int | dict, *, crop: bool = False) -> int:
    """The shorter side of an image, or the side of a square that is cut out of it."""
    if isinstance(size, int):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    if not crop or size["height"] != size["width"]:
        raise ValueError(f"images of {size} lose their proportions")
    return size["height"]


def _names_in(config: dict) -> tuple[str, ...]:
    if names := config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names"):
        return tuple(map(str, names))
    labels = {int(number): str(name) for number, name in config.get("id2label", {}).items()}
    return tuple(labels[number] for number in sorted(labels))


def _hub_file(source: str, repo: str, name: str) -> Path | None:
    """A file of a repository on the Hub, or None if it has no such file."""
    hub, constants, errors = (
        _package(name, source)
        for name in ("huggingface_hub", "huggingface_hub.constants", "huggingface_hub.errors")
    )
    check_home(constants.HF_HUB_CACHE, source, "HF_HOME")
    try:
        if hub.try_to_load_from_cache(repo, name) is hub._CACHED_NO_EXIST:
            return None  # which it says without a network too
        with quiet("huggingface_hub"):  # it logs every retry
            return Path(hub.hf_hub_download(repo, name))
    except errors.HFValidationError:
        raise InputError(f"{source}: the Hub's names are OWNER/REPO") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{source}: the Hub has no such repository, or a private one") from None
    except errors.LocalEntryNotFoundError:
        offline = "it gives no answer as the Hub does"
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else offline
        raise InputError(
            f"{source}: {name} is not in {constants.HF_HUB_CACHE} and not to be had from"
            f" {constants.ENDPOINT}: {offline}"
        ) from None
    except errors.EntryNotFoundError:
        return None
    except Exception as error:  # those of its HTTP client have no common base
        if isinstance(error, OSError) and error.errno:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{source}: {constants.ENDPOINT} fails: {printable(reason)}") from None


def _check_blob(source: str, path: Path):
    """Raises InputError if a file differs from the digest under which the Hub's cache has it."""
    blob = Path(os.path.realpath(path))
    digest = None
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        digest = sha256(blob)
    elif re.fullmatch("[0-9a-f]{40}", blob.name):  # Git's, of files that are not in its LFS
        content = blob.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if digest and digest != blob.name:
        raise InputError(f"{source}: damaged, its checksum is not {blob.name[:16]}; delete {blob}")


def _json(source: str, path: Path | None) -> dict:
    """The object in a JSON file; {} without a file."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{source}: its {path.name} is no JSON object; delete {path}")
    return values


def _from_url(source: str, rest: str) -> Found:
    """The file of a URL. A digest in its name is checked, and torch.hub has the file under the same
    name; without one the URL's digest keeps files of one name apart."""
    try:
        address = urlsplit(source)
    except ValueError as error:
        raise InputError(f"{source}: {printable(error)}") from None
    if "@" in address.netloc:  # the run's files would keep it
        raise InputError(
            f"{address.hostname}: a URL here has no name and no password; download the file, and"
            " give its path"
        )
    name = unquote(Path(address.path).name)
    if not name or "/" in name:
        raise InputError(f"{source}: the URL names no file")
    folder = _torch_hub()
    check_home(str(folder), source, "TORCH_HOME")
    if not files.digest_in_name(name):
        folder /= hashlib.sha256(source.encode()).hexdigest()[:16]
    path = folder / name
    if not path.is_file():
        _download(source, path)
    elif fault := files.fault_by_name(path, name):
        raise InputError(f"{source}: damaged, {fault}; delete {path}")
    return Found(path)


def _torch_hub() -> Path:
    """The folder in which torch.hub keeps weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", f"{cache}/torch")
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints"


def _download(url: str, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        _fetch(url, part)
        with part.open("rb") as file:
            if file.read(64).lstrip().startswith(b"<"):
                raise InputError(f"{url}: the server answers with a web page, not with a file")
        if fault := files.fault_by_name(part, path.name):
            raise InputError(f"{url}: damaged on its way, {fault}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, path: Path):
    """Write what a server answers to a file; InputError if there is no answer or a part of it."""
    try:
        with urlopen(url, timeout=_SECONDS) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
            length = answer.headers.get("Content-Length")
            if length and file.tell() != int(length):
                raise InputError(f"{url}: cut off after {file.tell():,} of {int(length):,} bytes")
    except HTTPError as error:
        raise InputError(f"{url}: the server answers {error.code} {error.reason}") from None
    except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{url}: not in {_torch_hub()}, and there is no connection: {printable(reason)}"
        ) from None


_EXTRAS = {"torchvision": "torch", "huggingface_hub": "hub"}
"""{package: the extra of this project that brings it}; none brings timm."""


def _package(name: str, source: str):
    """An optional package, imported when it is needed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if package in _EXTRAS:
            raise extra_needed(source, error.name, _EXTRAS[package]) from None
        raise InputError(f"{source} needs {error.name}: `pip install {package}`") from None


_FINDERS = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_hub,
    "http": _from_url,
    "https": _from_url,
}
