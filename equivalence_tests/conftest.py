"""Strict JAX for every test: eight CPU devices, rank promotion is an error."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import pytest
import torch

jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(2)


@pytest.fixture
def x64():
    """Float64 in JAX for one test, asserted to be on."""
    with jax.enable_x64(True):
        assert jax.numpy.zeros(1).dtype == "float64"
        yield
