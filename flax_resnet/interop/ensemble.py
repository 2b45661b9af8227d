"""Several runs as one, which averages what they predict."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp

from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.errors import InputError, check_type
from flax_resnet.interop.loaded_run import LoadedRun
from flax_resnet.text import listed
from flax_resnet.training.network import Network, Preprocess, Variables

AVERAGES = ("probabilities", "logits")


@dataclasses.dataclass(frozen=True)
class _Member:
    network: Network
    preprocess: Preprocess
    order: np.ndarray
    """Numbers of the member's classes in the order of the first member's."""


@dataclasses.dataclass(frozen=True)
class _Networks:
    """Has the `apply` of a `Network`; its logits are the logarithms of the mean probabilities, or
    the mean logits."""

    members: tuple[_Member, ...]
    average: str

    def apply(self, variables: Variables, images, *, train: bool):
        """Images `[B, H, W, C]` in [0, 1] -> (logits `[B, K]`, the statistics as they were)."""
        found = [
            member.network.apply(
                Variables(*(part[number] for part in variables)),
                member.preprocess.normalize(images),
                train=train,
            )[0][:, member.order]
            for number, member in enumerate(self.members)
        ]
        kind = jnp.result_type(jnp.float32, *found)  # members may compute in different types
        logits = jnp.stack(found).astype(kind)
        if self.average == "logits":
            return logits.mean(0), variables.batch_stats
        total = logsumexp(jax.nn.log_softmax(logits), axis=0)
        return total - jnp.log(len(found)), variables.batch_stats

    def to_model(self, variables: Variables):
        """Raises InputError: several networks have no common layers."""
        raise InputError(
            "an ensemble has no `model`, `features` or `without_batchnorm`; each of its runs has"
        )


def ensemble(runs: dict[str, LoadedRun], average: str = "probabilities") -> LoadedRun:
    """Join several runs into one that averages what they predict.

    The ensemble decodes each image once and normalises it for each run as in that run's training. A
    single run is returned as it is. An ensemble predicts, but its `model`, `features` and
    `without_batchnorm` raise InputError: each of its runs has its own. JAX's float64 is switched on
    if one of the runs computes in it.

    Args:
      runs: {name for messages: run}. The class names of the first run are those of the ensemble.
      average: what is averaged, "probabilities" or "logits".

    Raises:
      InputError: a run has other classes, channels, image sizes or EXIF turns than the first run,
        or there is no run.

    Examples:
      >>> runs = {name: flax_resnet.load_run(name) for name in ["runs/digits"]}  # and others
      >>> flax_resnet.ensemble(runs).class_names[:3]
      ('0', '1', '2')
    """
    if average not in AVERAGES:
        raise InputError(f"`average` is {listed(AVERAGES)}, got {average!r}")
    if not (isinstance(runs, Mapping) and runs):
        raise InputError("`runs` is a dict of names and loaded runs, and not empty")
    for name, run in runs.items():
        check_type(f"runs[{name!r}]", run, LoadedRun, "a LoadedRun")
    (first_name, first), *others = runs.items()
    if not others:
        return first
    for name, run in others:
        _check(name, run, first_name, first)
    if any(run.config.model.dtype == "float64" for run in runs.values()):
        jax.config.update("jax_enable_x64", True)  # a run that is loaded later switches it off
    members = tuple(
        _Member(run.network, run.preprocess, _order(run, first.class_names))
        for run in runs.values()
    )
    parts = zip(*(run.variables for run in runs.values()), strict=True)
    channels = first.channels
    data = dataclasses.replace(first.config.data, mean=(0.0,) * channels, std=(1.0,) * channels)
    return dataclasses.replace(
        first,
        config=dataclasses.replace(first.config, data=data),
        network=_Networks(members, average),
        variables=Variables(*map(list, parts)),
    )


def _order(run: LoadedRun, names: Sequence[str]) -> np.ndarray:
    """Published weights may give several classes one name; these keep their order."""
    order = np.empty(len(names), int)
    order[np.argsort(names, kind="stable")] = np.argsort(run.class_names, kind="stable")
    return order


def _check(name: str, run: LoadedRun, first_name: str, first: LoadedRun):
    if sorted(run.class_names) != sorted(first.class_names):
        raise InputError(
            f"{name} has the classes {listed(run.class_names)}, {first_name} has"
            f" {listed(first.class_names)}"
        )
    own, other = (
        {"channels": each.channels, "exif_transpose": each.config.data.exif_transpose}
        | dataclasses.asdict(evaluation_decoder(each.config.data))
        for each in (run, first)
    )
    for what, value in own.items():
        if value != other[what]:
            raise InputError(
                f"{name} takes images of {what} {value}, {first_name} of {other[what]}: they cannot"
                " share them"
            )
