"""Compare runs: `flax-resnet compare` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("compare")
