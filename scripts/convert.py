"""Convert weights and export programs: `flax-resnet convert` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("convert")
