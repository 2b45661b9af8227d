"""Measurements about the proof and the trainings, each a command that writes to `results/`."""
