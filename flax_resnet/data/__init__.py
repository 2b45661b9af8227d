"""Image sources, splits, decoding, batch order and augmentation.

Nothing here knows of networks' weights.
"""
