"""Measurements of the tests and of trainings; each is a command that writes to `results/`."""
