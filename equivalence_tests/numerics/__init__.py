"""Tests that JAX computes the same numbers as PyTorch."""
