"""Hand-written lowerings: convolutions and sums on CPUs, max-pooling on every platform.

Nothing here knows of networks.
"""
