"""Run directories: checkpoints, tables, plots and what a person sees.

Nothing here computes a step.
"""
