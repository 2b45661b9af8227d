"""Cross-validate a training: `flax-resnet cross-validate` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("cross-validate")
