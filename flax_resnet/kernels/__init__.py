"""Hand-written lowerings of convolutions and sums for one platform.

Nothing here knows of networks.
"""
