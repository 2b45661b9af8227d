"""Run directories: checkpoints, tables, plots and console output.

Nothing here computes a step.
"""
