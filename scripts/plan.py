"""Compile a training for devices that are not here: `flax-resnet plan` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("plan")
