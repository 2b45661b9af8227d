"""Timing of JAX and PyTorch side by side, and of alternatives within JAX.

Equality is checked here only for the programs that are timed.
"""
