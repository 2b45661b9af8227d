"""The comparison of a JAX network with a PyTorch network, tensor by tensor, as users call it.

This package contains no test and no injected fault.
"""


def __getattr__(name: str):
    """Import `compare_models` when it is first used, because it needs PyTorch."""
    if name == "compare_models":
        from equivalence_tests.parity.ports.judge import compare_models

        return compare_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
