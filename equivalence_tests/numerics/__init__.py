"""Test files that hold numbers: what JAX computes equals what PyTorch computes."""
