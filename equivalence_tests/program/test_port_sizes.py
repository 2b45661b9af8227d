"""Paddings that one size of images hides, and bounds near 0 that no usual value reaches."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from flax import linen
from torch import nn

from equivalence_tests.parity import compare_models
from equivalence_tests.program.test_port_kinds import Linen, Torch, conv, pooled

SAME = 'the padding is "SAME"'
FIXED = [(1, 1), (1, 1)]


def strided(strides, padding, window=(3, 3)):
    def body(x, train):
        x = linen.Conv(6, window, strides, padding=padding)(x)
        return linen.Dense(4)(linen.relu(x).mean((1, 2)))

    return Linen(body)


def strided_in_torch(strides, padding=1, window=3):
    return nn.Sequential(nn.Conv2d(3, 6, window, strides, padding), nn.ReLU(), *pooled())


@pytest.mark.control
@pytest.mark.parametrize(
    "strides,size",
    [
        ((2, 1), None),
        pytest.param((1, 2), (15, 18), marks=pytest.mark.slow),
        pytest.param((2, 2), None, marks=pytest.mark.slow),
    ],
)
def test_a_padding_is_compared_along_each_axis(strides, size):
    """At one height and width, each axis sees one of the two kinds of sizes."""
    net = strided_in_torch(strides)
    assert compare_models(strided(strides, FIXED), net, image_size=size).verdict == "equal"
    same = compare_models(strided(strides, "SAME"), net, image_size=size)
    assert same.groups() == {SAME: ["0"]} and same.explained
    for wrong in ([(0, 1), (1, 1)], [(1, 1), (0, 1)]):
        report = compare_models(strided(strides, wrong), net, image_size=size)
        assert report.verdict == "divergent", str(report)


@pytest.mark.control
def test_patches_are_compared_at_a_size_that_they_do_not_fill():
    """ConvNeXt's layers between its stages; at an even size "SAME" adds nothing to them."""
    net = strided_in_torch(2, 0, window=2)
    same, valid = (strided((2, 2), padding, (2, 2)) for padding in ("SAME", "VALID"))
    assert compare_models(same, net).groups() == {SAME: ["0"]}
    assert compare_models(valid, net).verdict == "equal"
    filled = compare_models(same, net, image_size=(40, 42))
    assert filled.hidden == ["0 sees only even sizes (40 x 42)"]


def test_patches_of_a_fixed_number_fill_the_image():
    """With more patches both networks raise, so that "SAME" is no difference."""
    net = nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(), nn.Linear(6 * 4 * 6, 4))

    def body(x, train):
        x = linen.Conv(6, (2, 2), (2, 2), padding="SAME")(x)
        return linen.Dense(4)(x.reshape(len(x), -1))

    assert compare_models(Linen(body), net, image_size=(8, 12)).verdict == "equal"


@pytest.mark.control
def test_a_stride_of_four_gets_a_size_at_which_a_pixel_shows():
    """AlexNet's stem: a pixel less behind the image shows at one of four sizes."""
    net = strided_in_torch(4, 2, window=11)
    wrong, right = (strided((4, 4), padding, (11, 11)) for padding in (2 * [(2, 1)], 2 * [(2, 2)]))
    assert compare_models(wrong, net).verdict == "divergent"
    assert compare_models(right, net).verdict == "equal"


@pytest.mark.parametrize("channels", [1, 3])
def test_pools_of_a_network_of_one_size(channels):
    """With more windows both networks raise. One channel has strides of its own in PyTorch."""
    layers = nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(6 * 4 * 6, 4))

    def body(x, train):
        x = linen.max_pool(linen.relu(conv(x)), (2, 2), (2, 2))
        return linen.Dense(4)(x.transpose(0, 3, 1, 2).reshape(len(x), -1))

    assert compare_models(Linen(body), net, image_size=(8, 12)).verdict == "equal"


def test_pixels_may_be_put_into_channels_first():
    net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 6, 3, padding=1), nn.ReLU(), *pooled())

    def body(x, train):
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
        x = conv(x.reshape(batch, height // 2, width // 2, 12))
        return linen.Dense(4)(linen.relu(x).mean((1, 2)))

    assert compare_models(Linen(body), net, image_size=(8, 12)).verdict == "equal"


def test_an_adaptive_pool_gets_a_size_that_it_does_not_divide():
    net = nn.Sequential(nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(18, 4))

    def body(x, train):
        rows, columns = (
            [(n * i // m, -(-n * (i + 1) // m)) for i in range(m)]
            for n, m in zip(x.shape[1:3], (2, 3), strict=True)
        )
        parts = [x[:, a:b, c:d].mean((1, 2)) for a, b in rows for c, d in columns]
        return linen.Dense(4)(jnp.stack(parts, 2).reshape(len(x), -1))

    report = compare_models(Linen(body), net)
    assert report.verdict == "equal", str(report)


def normalised(guard):
    def body(x, train):
        x = linen.relu(conv(x)).mean((1, 2))
        return linen.Dense(4)(x / guard(jnp.linalg.norm(x, axis=-1, keepdims=True)))

    return Linen(body)


@pytest.mark.control
@pytest.mark.parametrize(
    "guard,verdict",
    [
        (lambda norm: jnp.maximum(norm, 1e-12), "equal"),
        (lambda norm: jnp.where(norm > 1e-12, norm, 1e-12), "equal"),
        (lambda norm: jnp.maximum(norm, 5e-4), "divergent"),
        (lambda norm: jnp.where(norm > 1e-6, norm, 1e-6), "divergent"),
        (lambda norm: norm, "divergent"),
    ],
)
def test_the_number_that_keeps_a_division_from_0_is_compared(guard, verdict):
    def twin(net, x):
        return net.head(F.normalize(F.relu(net.conv(x)).mean((2, 3)), dim=1))

    net = Torch(twin, conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))
    report = compare_models(normalised(guard), net)
    assert report.verdict == verdict, str(report)
    if verdict == "divergent":
        assert "head (or relu, mean, linalg_vector_norm, clamp_min, div before it)" in str(report)


def gem(x, power, guard=1e-6):
    """Generalised mean pooling."""
    return (jnp.maximum(x, guard) ** power).mean((1, 2)) ** (1 / power)


RETRIEVAL = {
    "GeM": (
        lambda x, module: gem(conv(x), module.param("p", linen.initializers.ones, ())),
        lambda net, x: net.conv(x).clamp(min=1e-6).pow(net.p).mean((2, 3)).pow(1 / net.p),
    ),
    "deviation": (
        lambda x, module: conv(x).std((1, 2)),
        lambda net, x: net.conv(x).std((2, 3), unbiased=False),
    ),
    "softplus": (
        lambda x, module: jax.nn.softplus(conv(x)).mean((1, 2)),
        lambda net, x: F.softplus(net.conv(x)).mean((2, 3)),
    ),
}


class Retrieval(linen.Module):
    pool: object

    @linen.compact
    def __call__(self, x, train=False):
        x = self.pool(x, self)
        norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
        return linen.Dense(4)(x / jnp.maximum(norm, 1e-12))


@pytest.mark.parametrize("kind", RETRIEVAL)
def test_right_bounds_near_0_are_no_difference(kind):
    """Small parameters leave no right digit, or do not reach the bound that both networks have."""
    ours, theirs = RETRIEVAL[kind]
    net = Torch(lambda net, x: net.head(F.normalize(theirs(net, x), dim=1)),
                conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))  # fmt: skip
    if kind == "GeM":
        net.p = nn.Parameter(torch.ones(()))
    report = compare_models(Retrieval(ours), net, image_size=(9, 12))
    assert report.verdict == "equal", str(report)


@pytest.mark.control
@pytest.mark.parametrize("maximum", [torch.maximum, torch.clamp, torch.clamp_min])
def test_a_bound_that_is_a_tensor_is_looked_for(maximum):
    def twin(net, x):
        x = F.relu(net.conv(x)).mean((2, 3))
        return net.head(x / maximum(x.norm(dim=1, keepdim=True), torch.tensor(1e-12)))

    net = Torch(twin, conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))
    assert compare_models(normalised(lambda n: n), net, image_size=(9, 12)).verdict == "divergent"
    guarded = normalised(lambda norm: jnp.maximum(norm, 1e-12))
    assert compare_models(guarded, net, image_size=(9, 12)).verdict == "equal"


@pytest.mark.control
def test_a_bound_by_where_is_looked_for():
    def body(x, train):
        x = linen.relu(conv(x))
        return linen.Dense(4)(jnp.where(x > 1e4, 1e4, x).mean((1, 2)))

    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *pooled())
    report = compare_models(Linen(body), net)
    assert report.hidden == ["JAX's network never reaches its bound of 10000"]


@pytest.mark.control
def test_what_stands_before_a_layer_is_named_too():
    def body(x, train):
        x = linen.max_pool(linen.relu(conv(x)), (3, 3), (1, 1)) ** 1.01
        return linen.Dense(4)(linen.relu(conv(x)).mean((1, 2)))

    layers = {"0": nn.Conv2d(3, 6, 3, padding=1), "pool": nn.MaxPool2d(3, 1)}
    net = nn.Sequential(*layers.values(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), *pooled())
    net.insert(1, nn.ReLU())
    report = compare_models(Linen(body), net, image_size=(9, 12))
    assert "no known cause: 3 (or 1, 2 before it)" in str(report)
    assert report.divergent_layers()[0]["before"] == ["1", "2"]
