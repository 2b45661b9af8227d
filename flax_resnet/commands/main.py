"""The console command: `flax-resnet SUBCOMMAND [flags]`. `scripts/` call the same modules."""

import importlib
import os
import sys

from flax_resnet.commands import (
    cli,
    exits,
    memory,  # noqa: F401 - before any import that starts threads
)
from flax_resnet.errors import InputError
from flax_resnet.text import say

COMMANDS = {
    "train": ("flax_resnet.commands.train", "train a network and write a run directory"),
    "evaluate": ("flax_resnet.commands.evaluate", "evaluate a run on a split of a data set"),
    "predict": ("flax_resnet.commands.predict", "classify images with a run"),
    "compare": ("flax_resnet.commands.compare", "compare runs: figures, settings, curves"),
    "cross-validate": ("flax_resnet.commands.cross_validate", "train once for each fold"),
    "shards": ("flax_resnet.commands.shards", "write a data set as ArrayRecord shards"),
    "convert": ("flax_resnet.commands.convert", "convert weights and export programs"),
    "plan": ("flax_resnet.commands.plan", "compile a training for GPUs and TPUs that are not here"),
    "parity": ("equivalence_tests.parity.command", "compare a JAX network with a PyTorch network"),
    "benchmark": ("equivalence_tests.benchmark.command", "time JAX and PyTorch side by side"),
    "reproduce": ("equivalence_tests.studies.reproduce", "run recipes and make their table"),
}
"""{subcommand: (its module, its purpose)}; only the module of the called subcommand is imported."""


def run(name: str):
    """Run a subcommand with the flags in `sys.argv` and end the process with its status."""
    os.environ.pop("MPLBACKEND", None)  # commands draw files alone; Matplotlib refuses odd values
    exits.run_command(lambda: _module(name).main())


def _module(name: str):
    """The module of a subcommand, whose import makes JAX read its variables of the environment."""
    try:
        return importlib.import_module(COMMANDS[name][0])
    except ValueError as error:
        raise InputError(f"a variable of the environment has no valid value: {error}") from None


def main():
    """Entry point of `flax-resnet`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"flax-resnet {name}", *sys.argv[2:]]
        run(name)
    exits.run_command(lambda: _no_subcommand(name))


def _no_subcommand(name: str):
    if name not in ("-h", "--help"):
        cli.check_choice("SUBCOMMAND", name, COMMANDS)
    say("flax-resnet SUBCOMMAND [flags]", "")
    for command, (_, purpose) in COMMANDS.items():
        say(f"  {command:16s}{purpose}")
    say("", "flax-resnet SUBCOMMAND --help lists the flags of a subcommand")
