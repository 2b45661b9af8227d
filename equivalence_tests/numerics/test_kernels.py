"""Operations that are computed in another way than the library's give the same numbers faster.

Each test has the library's own way as its control. Where the control passes, our way can go.
"""

import re
from collections import Counter
from functools import partial
from typing import get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from torch.nn import functional as F

from equivalence_tests.benchmark import lowerings
from equivalence_tests.parity import inputs
from flax_resnet.config import Kernels, ModelConfig, ParallelConfig, TrainConfig
from flax_resnet.devices.parallel import Engine
from flax_resnet.kernels import cpu_convolution, sliced_max_pool
from flax_resnet.kernels.cpu_convolution import compiler_options
from flax_resnet.kernels.cpu_sum import library_sum, sum_of_pixels
from flax_resnet.models import create_model, layers
from flax_resnet.models.resnet import BasicBlock, ResNet
from flax_resnet.training.network import Network

pytestmark = pytest.mark.quick


def program(function, *arrays) -> str:
    """The compiled program's text."""
    compiled = jax.jit(function, compiler_options=compiler_options("cpu"))
    return compiled.lower(*arrays).compile().as_text()


def operations(text: str) -> set[str]:
    return set(re.findall(r" = \S+ ([a-z-]+)\(", text))


def pool_gradient(pool, x, window, stride, padding):
    def value(x):
        highest = pool(x, window, stride, padding=padding)
        weights = jnp.arange(1, highest.size + 1, dtype=x.dtype).reshape(highest.shape)
        return (weights * highest).sum()

    return jax.jit(jax.grad(value))(x)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (9, 12)])
@pytest.mark.parametrize("window, stride, padding", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
def test_of_equal_pixels_the_first_takes_the_gradient(size, window, stride, padding, x64):
    x = inputs.random_numbers().integers(0, 3, (2, *size, 4)).astype(np.float64)  # ties
    ours = pool_gradient(layers.max_pool, x, window, stride, padding)
    assert np.array_equal(
        ours, pool_gradient(lowerings.window_max_pool, x, window, stride, padding)
    )
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    highest = F.max_pool2d(theirs, window, stride, padding).permute(0, 2, 3, 1)
    (torch.arange(1, highest.numel() + 1).reshape(highest.shape) * highest).sum().backward()
    assert np.array_equal(ours, theirs.grad.permute(0, 2, 3, 1))


SLOW_WINDOWS = {"reduce-window", "select-and-scatter", "scatter"}


def slow_windows(pool) -> set[str]:
    x = np.ones((4, 8, 8, 16), np.float32)
    return SLOW_WINDOWS & operations(program(lambda x: pool_gradient(pool, x, 3, 2, 1), x))


def test_a_max_pool_is_slices():
    assert not slow_windows(layers.max_pool)


@pytest.mark.control
def test_the_library_s_is_a_window():
    assert slow_windows(lowerings.window_max_pool)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (8, 8), (5, 7), (6, 5), (31, 13)])
def test_sums_of_pixels_keep_to_the_bound_of_pairs(size):
    """Higham, Accuracy and Stability of Numerical Algorithms, 4.2: as many roundings as additions
    that a number takes part in, here two a halving."""
    x = 5 + inputs.random_numbers().standard_normal((3, *size, 16)).astype(np.float32)
    rounding = 2 * np.ceil(np.log2(np.prod(size))) * 2.0**-24
    error = np.abs(np.float64(sum_of_pixels(jnp.asarray(x))) - x.sum((1, 2), np.float64))
    # 1.001: terms of second order
    assert (error <= 1.001 * rounding * np.abs(x).sum((1, 2), np.float64)).all()


def test_a_batch_of_vectors_has_one_pixel():
    x = np.arange(12.0).reshape(4, 3)
    assert np.array_equal(sum_of_pixels(jnp.asarray(x)), x)


def loops_over_pixels(function) -> int:
    text = program(lambda x: function(jnp.square(x)), np.ones((4, 16, 16, 32), np.float32))
    return len(re.findall(r" reduce(-window)?\(", text))


def test_sums_of_pixels_are_additions():
    assert loops_over_pixels(sum_of_pixels) == 0


def test_sums_are_the_librarys_on_cuda():
    x = jax.ShapeDtypeStruct((4, 16, 16, 32), jnp.float32)
    for platform, loops in {"cpu": False, "cuda": True}.items():
        program = jax.export.export(jax.jit(sum_of_pixels), platforms=[platform])(x).mlir_module()
        assert ("stablehlo.reduce(" in program) == loops


@pytest.mark.control
def test_the_library_s_sums_are_loops():
    assert loops_over_pixels(library_sum) > 0


def questions_for_a_sharding(function) -> int:
    """The number of times that tracing asks a tracer for its sharding, which it does not know."""
    asked = []
    with mock.patch.object(jax.core.Tracer, "sharding", property(asked.append)):
        jax.make_jaxpr(function)(np.ones((2, 3, 3, 4), np.float32))
    return len(asked)


def test_statistics_are_set_without_a_question():
    assert questions_for_a_sharding(lambda x: layers.BatchNorm(4)(x)) == 0


@pytest.mark.control
def test_the_library_s_assignment_asks():
    def assign(x):
        nnx.BatchStat(jnp.zeros_like(x))[...] = x

    assert questions_for_a_sharding(assign) > 0


def test_relu_keeps_nan():
    x = np.array([np.nan, -np.inf, -1, -0.0, 0.0, 1, np.inf], np.float32)
    assert np.array_equal(layers.relu(jnp.asarray(x)), F.relu(torch.tensor(x)), equal_nan=True)


def abstract_network(kernels: str) -> Network:
    return Network(nnx.eval_shape(lambda: create_model("resnet18", kernels=kernels)))


IMAGES = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize(
    "place, name",
    [
        (cpu_convolution, "_convolution"),
        (sliced_max_pool, "max_pool"),
        (layers, "_standardize"),
        (layers, "sum_of_pixels"),
    ],
)
def test_one_switch_turns_every_lowering_off(place, name):
    called = {}
    for kernels in get_args(Kernels):
        network = abstract_network(kernels)
        apply = partial(network.apply, train=True)
        with mock.patch.object(place, name, wraps=getattr(place, name)) as lowering:
            jax.eval_shape(apply, network.initial, IMAGES)
        called[kernels] = lowering.called
    assert called == {"auto": True, "library": False}


def test_the_switch_reaches_the_compiler():
    engines = [Engine(ParallelConfig(devices=1), kernels=kernels) for kernels in get_args(Kernels)]
    assert [bool(engine._options) for engine in engines] == [True, False]


def test_a_deterministic_run_needs_the_max_pool_of_this_project():
    with pytest.raises(ValueError, match="`deterministic` needs `kernels` auto"):
        TrainConfig(deterministic=True, model=ModelConfig(kernels="library"))


def exported(kernels: str, *platforms: str, gradients=False) -> str:
    """The program of a ResNet-18, exported on this machine."""
    network = abstract_network(kernels)

    def value(params, images, variables):
        variables = variables._replace(params=params)
        return network.apply(variables, images, train=False)[0].sum()

    function = jax.jit(jax.grad(value, (0, 1)) if gradients else value)
    arrays = network.initial.params, IMAGES, network.initial
    return jax.export.export(function, platforms=platforms)(*arrays).mlir_module()


def on_the_last_platform(program: str) -> Counter:
    """{operation: count} of what a program of several platforms computes on the last of them."""

    innermost = re.compile(r"stablehlo\.case((?:(?!stablehlo\.case).)*?)}\) : ", re.DOTALL)
    while "stablehlo.case" in program:
        program = innermost.sub(lambda case: case[1].split("}, {")[-1], program)
    return Counter(re.findall(r"stablehlo\.(convolution|dot_general)", program))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
def test_a_program_for_cuda_holds_the_librarys_convolutions(platforms, gradients):
    """The host of the export does not matter; this one has a CPU alone."""
    options = dict(gradients=gradients)
    ours = on_the_last_platform(exported("auto", *platforms, **options))
    assert ours == on_the_last_platform(exported("library", "cuda", **options))
    assert gradients or ours == {"convolution": 20, "dot_general": 1}


def test_a_program_for_a_cpu_multiplies_on_small_maps():
    assert on_the_last_platform(exported("auto", "cpu")) == {"convolution": 10, "dot_general": 11}
    library = on_the_last_platform(exported("library", "cpu"))
    assert library == {"convolution": 20, "dot_general": 1}


SMALL_IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def operations_per_block(*, gradients: bool) -> list[float]:
    """Floating-point operations of a compiled program that each of three groups of blocks adds."""
    found = []
    for depth in (2, 4, 6, 8):
        model = ResNet(BasicBlock, (depth,), stem="cifar", planes=8, rngs=nnx.Rngs(0))
        structure, variables = nnx.split(model)

        def total(variables, images, structure=structure):
            return nnx.merge(structure, variables)(images).sum()

        function = jax.grad(total, allow_int=True) if gradients else total
        compiled = jax.jit(function).lower(variables, SMALL_IMAGES).compile()
        found.append(compiled.cost_analysis()["flops"])
    return np.diff(found).tolist()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a lowering for the CPU")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_costs_the_same_however_many_stand_before_it(gradients):
    assert len(set(operations_per_block(gradients=gradients))) == 1


@pytest.mark.control
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a lowering for the CPU")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_relu_as_a_maximum_is_computed_again_by_later_blocks(gradients):
    with lowerings.computed("maximum-relu"):
        first, second, third = operations_per_block(gradients=gradients)
    jax.clear_caches()
    assert first < second <= third


@pytest.mark.control
def test_a_choice_by_the_machine_that_traces_shows(monkeypatch):
    def of_this_machine(*arrays, cpu, default):
        return (cpu if jax.default_backend() == "cpu" else default)(*arrays)

    monkeypatch.setattr(lax, "platform_dependent", of_this_machine)
    jax.clear_caches()  # of what was traced without the fault
    found = on_the_last_platform(exported("auto", "cpu", "cuda"))
    jax.clear_caches()
    assert found == {"convolution": 10, "dot_general": 11}
