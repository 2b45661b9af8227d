"""Classify images with a run: `flax-resnet predict` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("predict")
