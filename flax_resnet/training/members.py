"""Training of several seeds at once, in one program: each member is a run of its own."""

import contextlib
from dataclasses import replace
from pathlib import Path

from flax_resnet.config import TrainConfig, differences
from flax_resnet.data.prepare import Prepared
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.runs.checkpoint import steps_in
from flax_resnet.runs.directory import RunDirectory, check_root, check_usable, reserve
from flax_resnet.runs.display import Display
from flax_resnet.runs.views import faults, is_begun, read_config
from flax_resnet.text import listed
from flax_resnet.training.fit import Start, announce, as_begun, begin, initial_network, run_all
from flax_resnet.training.network import Network

MOST = 1000
"""Most members."""


def folders(run_dir: Path, members: int) -> list[Path]:
    """The run directory of each member."""
    return [run_dir / f"member-{number}" for number in range(members)]


def fit_members(
    config: TrainConfig,
    run_dir: Path | str | None,
    members: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    display: Display | None = None,
) -> list[dict]:
    """Train several runs that differ in their seeds alone, on one device and in one program.

    Member i has the seed `config.seed + i`. Its directory member-i is that of a run, equal up to
    rounding to the one that `fit` writes for that seed. A member that stops early leaves the
    others. A loss that is not finite ends all.

    Args:
      config: as `fit`; its seed is that of member 0.
      run_dir: the directory of the members' directories; None: a new one, runs/ARCH-DATASET with a
        number where that is taken.
      members: number of runs, from 1 to `MOST`.
      resume: go on with members that have begun, and begin the others.
      overwrite: as `fit`.
      command: as `fit`.

    Returns:
      The report of each member.

    Raises:
      InputError: as `fit`; also for several devices, several processes and pmap, and for members
        that were begun with other settings.
      NonFiniteLoss, Interrupted, RunLost: as `fit`.
    """
    display, how = display or Display(), {"resume": resume, "overwrite": overwrite}
    places = _places(run_dir, members, how)
    first = places[0] if places else None
    if resume and is_begun(first):
        config = as_begun(config, read_config(first, say=lambda line: None))
    engine, prepared, network = begin(config, first, resume, display, members)
    each = [replace(prepared, config=own) for own in _of_seeds(prepared.config, members)]
    if resume:
        for fault in [fault for place in filter(is_begun, places) for fault in faults(place)]:
            display.say(f"{fault}; it is written anew")
        check_begun(prepared.config, places)
    networks = _networks(network, each, engine, places, how, display)
    root = Path(run_dir) if places else reserve(config)
    with contextlib.ExitStack() as closing:
        closing.callback(display.stop)
        starts = []
        for place, own, net in zip(folders(root, members), each, networks, strict=True):
            shown = display.of_member(place.name)
            directory = RunDirectory(place, **how, say=shown.say)
            closing.callback(directory.close)
            starts.append(Start(own, engine, net, directory, shown))
        announce(prepared, engine, network, root, display)
        display.say(f"{members} members, seeds {config.seed} to {each[-1].config.seed}")
        return run_all(starts, root, command)


def _places(run_dir: Path | str | None, members: int, how: dict) -> list[Path]:
    """The directories of the members, which may be written; none where they are chosen later."""
    if not 1 <= members <= MOST:
        raise InputError(f"`members`: from 1 to {MOST:,}, got {members}")
    if how["resume"] and run_dir is None:
        raise InputError("`resume` needs `run_dir`, the directory of the runs to continue")
    places = [] if run_dir is None else folders(Path(run_dir), members)
    for place in places:
        check_root(place.parent, "`members`")
        check_usable(place, **how)
    if places and (others := _others(places)):
        raise InputError(
            f"{listed(others)} would be no member of this training: remove it, or train more"
            " `members`"
        )
    return places


def _others(places: list[Path]) -> list[Path]:
    """Members of another training beside the places of this one."""
    beside = places[0].parent.glob("member-*")
    return sorted(place for place in beside if place not in places and is_begun(place))


def _of_seeds(config: TrainConfig, members: int) -> list[TrainConfig]:
    """The config of each member."""
    return [replace(config, seed=config.seed + number) for number in range(members)]


def check_begun(config: TrainConfig, places: list[Path]):
    """Raises InputError for a member that was begun with other settings than those of `config`,
    which is the first member's, but for its seed."""
    for own, place in zip(_of_seeds(config, len(places)), places, strict=True):
        if not is_begun(place):
            continue
        before = as_begun(own, read_config(place, say=lambda line: None))
        if other := differences(own, before):
            raise InputError(f"{place} is no such member: {listed(other.values())}")


def _networks(
    network: Network,
    each: list[Prepared],
    engine: Engine,
    places: list[Path],
    how: dict,
    display: Display,
) -> list[Network]:
    """The network of each member with its first weights; that of the first is given."""
    begun = [how["resume"] and steps_in(place / "checkpoints") for place in places]
    begun = begun or [False] * len(each)
    others = zip(each[1:], begun[1:], strict=True)
    return [network, *(initial_network(own, engine, goes_on, display) for own, goes_on in others)]
