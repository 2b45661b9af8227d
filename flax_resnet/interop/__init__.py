"""Runs taken elsewhere: served, made from weights, exported, exchanged with PyTorch's trainings."""
