"""Runs loaded for use, made from weights, exported, and exchanged with PyTorch trainings."""
