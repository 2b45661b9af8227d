"""The comparison of two networks, tensor by tensor, as users call it.

Nothing here is a test or a fault.
"""
