"""Train a network and write a run directory.

python scripts/train.py --arch resnet18                        # on scikit-learn's digits: a minute
python scripts/train.py --arch resnet20 --dataset folder:DIR --epochs 20 --horizontal-flip 0.5
python scripts/train.py --resume --run-dir runs/resnet18-digits   # continue an interrupted run
python scripts/train.py --members 8 --run-dir runs/digits         # runs/digits/member-0 to member-7

--recipe, --config and --init-from change the defaults of the flags below.
"""

from pathlib import Path

from flax_resnet.commands import cli, exits
from flax_resnet.config import TrainConfig, differences, flat
from flax_resnet.data.prepare import CHOSEN
from flax_resnet.devices import distributed
from flax_resnet.errors import InputError
from flax_resnet.runs.views import (
    damaged_steps,
    faults,
    is_begun,
    is_trained,
    read_config,
)
from flax_resnet.text import listed, say
from flax_resnet.training import fit, members, restore


def parse():
    parser = cli.Parser(description=__doc__)
    cli.add_starting_points(parser)
    parser.add_argument("--list-recipes", action="store_true", help="print the recipes and exit")
    about = "directory of the run (default: runs/ARCH-DATASET[-N])"
    parser.add_argument("--run-dir", metavar="PATH", help=about)
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    about = "number of runs to train at once, with the seeds SEED, SEED + 1, ..."
    parser.add_argument("--members", metavar="INT", type=int, help=about)
    about = "number of steps to trace into the run directory, for TensorBoard or XProf"
    parser.add_argument("--profile", metavar="STEPS", type=int, help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --run-dir")
    several = parser.add_argument_group("several processes, each started with the same flags")
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, or auto to ask the cluster (not needed under srun and mpirun)",
    )
    several.add_argument("--num-processes", metavar="INT", type=int, help="number of processes")
    several.add_argument(
        "--process-id", metavar="INT", type=int, help="number of this process, from 0 on"
    )
    about = "seconds to wait for the other processes at the start (default: 300)"
    several.add_argument("--connect-timeout", metavar="INT", type=int, default=300, help=about)
    cli.add_config_flags(parser)
    args = parser.parse_args()
    cli.check_positive("--connect-timeout", args.connect_timeout)
    cli.check_positive("--profile", args.profile)
    cli.check_positive("--members", args.members, members.MOST)
    if args.members and args.profile:
        raise InputError("--members and --profile exclude each other")
    return args


def run_dirs(args) -> list[Path]:
    """The directory of the run, or those of the members; [] if they are not given."""
    if not args.run_dir:
        return []
    root = Path(args.run_dir)
    return members.folders(root, args.members) if args.members else [root]


def resumed_config(args, run_dir: Path) -> TrainConfig:
    """The run's config; flags may only change devices, workers and the path of the data."""
    own = read_config(run_dir, say=lambda line: None)
    advice = (
        "--resume takes only those of devices, --num-workers, --eval-batch-size, and --dataset"
        " where the same data have moved; to train longer or with other settings, begin a new run"
        f" with --init-from {run_dir}"
    )
    check_settings(run_dir, cli.build_config(args, own), own, advice)
    return cli.merge(own, cli.requested_values(args))


def check_settings(run_dir: Path | str, config: TrainConfig, own: TrainConfig, advice: str):
    """Raises InputError, which ends with the advice, if a config asks for other results than the
    run of config `own`."""
    asked = fit.as_begun(own, config)
    left_open = {name for name in CHOSEN if flat(asked)[name] is None}
    if other := [line for name, line in differences(asked, own).items() if name not in left_open]:
        raise InputError(f"{run_dir} was begun with other flags: {listed(other)}; {advice}")


def new_config(args) -> TrainConfig:
    """The config of a new run, or of one whose config is read later."""
    begun = args.resume and args.run_dir and is_begun(run_dirs(args)[0])
    return cli.build_config(args, TrainConfig()) if begun else config_with_weights(args)


def config_with_weights(args) -> TrainConfig:
    """The config of the flags. With --init-from the settings that come with the weights are the
    defaults, unless --config or --recipe gives all of them."""
    config = cli.build_config(args, TrainConfig())
    cli.check_start(args.recipe, config)
    if args.config or args.recipe or not config.init_from:
        return config
    weights = restore.pretrained(config.init_from, config.weights_key, ema=config.ema)
    model = weights.model
    data = dict(weights.data)
    if args.image_size:  # the resize belongs to the size that is replaced
        data.pop("resize_size", None)
    known = {"data": data, "model": model if args.arch in (None, model["arch"]) else {}}
    return cli.build_config(args, cli.merge(TrainConfig(), known))


def runs_here() -> str:
    """The end of a message that lists the runs in runs/."""
    found = sorted(path.parent for path in Path("runs").glob("*/config.json"))
    return f"; runs/ holds {listed(found)}" if found else ""


def is_finished(run_dir: Path) -> bool:
    """True if the run is finished; then its damaged files are printed. A run counts as unfinished
    if only files that can be written anew are damaged."""
    if not (run_dir / "report.json").exists():
        return False
    views, steps = faults(run_dir), damaged_steps(run_dir)
    if views and not steps and is_trained(run_dir):
        return False
    if distributed.is_first():
        say(*views, *steps, f"{run_dir} is finished; nothing to do")
    return True


def described(name: str) -> str:
    """One line about a recipe: name, method, published figures and their source."""
    recipe = cli.ALL_RECIPES[name]
    figures = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in recipe.published.items()]
    facts = "; ".join(filter(None, [recipe.source, *figures]))
    return f"{name:33s}{recipe.method}{f' (published: {facts})' if facts else ''}"


def main():
    args = parse()
    if args.list_recipes:
        say(*map(described, cli.ALL_RECIPES))
        return
    if args.resume and not args.run_dir:
        raise InputError(f"--resume needs --run-dir{runs_here()}")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    config = new_config(args)
    processes = (args.coordinator, args.num_processes, args.process_id)
    with distributed.joined(*processes, timeout=args.connect_timeout):
        run(args, config)


def run(args, config: TrainConfig):
    places = run_dirs(args)
    if args.resume and is_begun(places[0]):
        config = resumed_config(args, places[0])
        if args.members:
            members.check_begun(config, places)
        ended = all((place / "report.json").exists() for place in places)
        if ended and all([is_finished(place) for place in places]):
            return
    how = {"resume": args.resume, "overwrite": args.overwrite, "command": exits.command_line()}
    if args.members:
        members.fit_members(config, args.run_dir or None, args.members, **how)
    else:
        fit.fit(config, args.run_dir or None, profile=args.profile or 0, **how)
