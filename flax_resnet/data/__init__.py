"""Image sources, splits, decoding, batch order and augmentation.

Nothing here reads or writes weights.
"""
