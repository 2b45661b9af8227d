"""The commands: flags -> config -> one call.

Only these modules know flags, and only these may need PyTorch.
"""
