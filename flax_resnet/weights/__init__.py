"""PyTorch's weights: files, names and layouts <-> the models' variables.

Nothing here trains or needs PyTorch.
"""
