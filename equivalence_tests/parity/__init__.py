"""The comparison of two networks, tensor by tensor, as users call it.

No test and no injected fault lives here.
"""


def __getattr__(name: str):
    """`compare_models`, imported when it is used: it needs PyTorch."""
    if name == "compare_models":
        from equivalence_tests.parity.ports.judge import compare_models

        return compare_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
