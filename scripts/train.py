"""Train a network and write a run directory: `flax-resnet train` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("train")
