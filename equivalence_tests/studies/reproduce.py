"""Run recipes over seeds and rebuild the table of results from the files of their runs.

python scripts/reproduce.py --table                      # only rebuild the table
python scripts/reproduce.py imagenette-cnn --imagenette folder:DIR
python scripts/reproduce.py cifar10-resnet20-short --cifar10 folder:DIR --seeds 0 1 2 --torch

Finished runs are skipped, and interrupted runs continue. Without a RECIPE, all recipes run. Then,
without a GPU, a recipe that would take hours takes 512 images of each split.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import jax

from equivalence_tests.studies import reproduction, reproduction_page
from equivalence_tests.studies.reproduction import folder_name
from flax_resnet.commands import cli, output_files
from flax_resnet.config import TrainConfig
from flax_resnet.errors import InputError
from flax_resnet.files import replacing
from flax_resnet.recipes import CIFAR10, IMAGENETTE, RECIPES
from flax_resnet.runs import views

ROOT = Path(__file__).parents[2]
COMMANDS = {"jax": [str(ROOT / "scripts" / "train.py")], "torch": ["-m", "torch_ref.train"]}
SUBSET = 512


def parse():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="names (default: all)")
    about = "seeds, one run for each (default: 0)"
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="INT", help=about)
    parser.add_argument("--torch", action="store_true", help="also run the recipe in PyTorch")
    about = "use only so many images of each split; the table says so"
    parser.add_argument("--subset", type=int, metavar="INT", help=about)
    about = "place of {} (default: %(default)s)".format
    parser.add_argument("--cifar10", default=CIFAR10, metavar="DATASET", help=about("CIFAR-10"))
    parser.add_argument(
        "--imagenette", default=IMAGENETTE, metavar="DATASET", help=about("Imagenette")
    )
    parser.add_argument("--runs", default="runs/recipes", metavar="DIR", help=about("the runs"))
    about = "folder of the table and of each run's files (default: results)"
    parser.add_argument("--results", default=str(ROOT / "results"), metavar="DIR", help=about)
    parser.add_argument("--table", action="store_true", help="run nothing, only write the table")
    args = parser.parse_args()
    cli.check_positive("--subset", args.subset)
    for seed in args.seeds:
        cli.merge(TrainConfig(), {"seed": seed})  # raises for a seed that no run takes
    for flag, path in (("--runs", args.runs), ("--results", args.results)):
        output_files.check_folder(flag, Path(path))
    return args


def chosen(args) -> list[str]:
    """The recipes to run, each after what it starts from."""
    for name in args.names:
        cli.check_choice("RECIPE", name, RECIPES)
    return list(dict.fromkeys(step for name in args.names or RECIPES for step in lineage(name)))


def lineage(name: str) -> list[str]:
    """The recipe, after all that it goes back to."""
    source = RECIPES[name].starts_from
    return [*(lineage(source) if source else []), name]


def subset(args, name: str) -> int | None:
    """Images of each split to be used, None for all: who names a recipe means the whole."""
    too_long = RECIPES[name].gpu and not args.names and jax.default_backend() != "gpu"
    return args.subset or (SUBSET if too_long else None)


def run(args, name: str, seed: int, framework: str):
    """One run in a process of its own, to its end; then its files go to the results."""
    place = Path(name) / folder_name(seed, framework, subset(args, name))
    run_dir = Path(args.runs) / place
    if not is_whole(run_dir, framework):
        words = [*COMMANDS[framework], "--recipe", name, "--resume"]
        if source := RECIPES[name].starts_from:
            start = folder_name(seed, framework, subset(args, source))
            words += ["--init-from", str(Path(args.runs) / source / start)]
        words += ["--dataset", dataset(args, name), "--seed", str(seed), "--run-dir", str(run_dir)]
        if count := subset(args, name):
            words += ["--train-images", str(count), "--eval-images", str(count)]
        print(f"{place}: running", flush=True)
        status = subprocess.run([sys.executable, *words]).returncode
        if status:
            sys.exit(status)
    kept = Path(args.results) / "recipes" / place
    kept.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, (run_dir / name for name in reproduction.KEPT)):
        with replacing(kept / file.name) as copy:
            shutil.copyfile(file, copy)


def is_whole(run_dir: Path, framework: str) -> bool:
    """True if a run is finished and its files are as it wrote them; what is damaged is written anew
    by a run that goes on.

    Raises:
      InputError: the run is finished and cannot go on, or its report is unreadable.
    """
    if not (run_dir / "report.json").exists():
        return False
    if framework == "jax":
        return not views.faults(run_dir)
    return bool(views.read_report(run_dir / "report.json"))


def dataset(args, name: str) -> str:
    return args.cifar10 if RECIPES[name].config.data.dataset == CIFAR10 else args.imagenette


def check_datasets(args, names: list[str]):
    """Refuses a data set that the twin cannot read, before the first run."""
    for name in names:
        place = dataset(args, name)
        readable = place == "digits" or place.startswith("folder:")
        if args.torch and not readable:
            raise InputError(
                f"--torch: {name} is on {place}, and torch_ref.train reads digits and folders: give"
                " --cifar10 or --imagenette as folder:DIR"
            )


def main():
    args = parse()
    names = [] if args.table else chosen(args)
    check_datasets(args, names)
    for name in names:
        for seed in args.seeds:
            for framework in ("jax", "torch")[: 1 + args.torch]:
                run(args, name, seed, framework)
    rows = reproduction_page.rebuild(Path(args.results))
    print(reproduction_page.markdown(rows), reproduction_page.not_run(rows), sep="\n")
    print(reproduction_page.pairs_markdown(rows))
