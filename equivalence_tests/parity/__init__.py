"""The comparison of two networks, tensor by tensor, as users call it.

No test and no injected fault lives here.
"""
