"""Time JAX and PyTorch side by side: `flax-resnet benchmark` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("benchmark")
