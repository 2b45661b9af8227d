"""JAX and PyTorch timed side by side, and the costs of JAX's own ways.

Nothing here judges equality but of what is timed.
"""
