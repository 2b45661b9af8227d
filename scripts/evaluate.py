"""Evaluate a run on a split of a data set: `flax-resnet evaluate` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("evaluate")
