"""Conversion of PyTorch's weights: files, names, layouts, the models' variables.

Nothing here trains or needs PyTorch.
"""
