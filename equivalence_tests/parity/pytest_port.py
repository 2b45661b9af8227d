"""A pytest fixture for a port's own tests: `assert_port_equal(jax_net, torch_net)`.

# conftest.py
pytest_plugins = ["equivalence_tests.parity.pytest_port"]

# test_port.py
def test_port(assert_port_equal):
    assert_port_equal(make_jax_net(), make_torch_net())
"""

import logging

import pytest


@pytest.fixture(scope="session")
def assert_port_equal():
    """A function (jax_net, torch_net, **options) that fails unless the port is equal.

    Options and errors are those of `equivalence_tests.parity.compare_models`; the failure says
    which layers differ, and why.
    """
    from equivalence_tests.parity import compare_models

    # torch.export logs there what it does, and pytest prints that below every failure.
    logging.getLogger("torch.__trace").propagate = False

    def check(jax_net, torch_net, **options):
        __tracebackhide__ = True
        report = compare_models(jax_net, torch_net, **options)
        if report.verdict != "equal":
            pytest.fail(str(report), pytrace=False)
        return report

    return check
