"""Compare a network in JAX with PyTorch, tensor by tensor: `flax-resnet parity` from a checkout."""

from flax_resnet.commands.main import run

if __name__ == "__main__":
    run("parity")
