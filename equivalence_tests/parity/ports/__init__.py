"""Judges anybody's JAX network against anybody's PyTorch network.

Nothing here knows a network's names or its framework: both sides are graphs of operations. What
knows this project's own networks belongs into `equivalence_tests.parity`.
"""
