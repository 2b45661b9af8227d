"""Dropout and stochastic depth are compared with the same masks in both networks."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
import torch.nn.functional as F
from flax import nnx
from torch import nn

from equivalence_tests.parity import compare_models
from equivalence_tests.program.test_port_kinds import Linen, Torch, conv

SIZE = (5, 7)


pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


def drop(x, rate, train, shared=()):
    return linen.Dropout(rate, broadcast_dims=shared)(x, deterministic=not train)


def drop_path(module, x, rate, train):
    """Stochastic depth as a user writes it, with a uniform number for each image."""
    if not train:
        return x
    draw = jax.random.uniform(module.make_rng("drop_path"), (len(x), 1, 1, 1))
    return x / (1 - rate) * jnp.floor(1 - rate + draw)


class Port(linen.Module):
    """A network with dropout of three kinds; what is wrong with it is in `faults`."""

    faults: tuple = ()

    @linen.compact
    def __call__(self, x, train=False):
        wrong = self.faults
        x = linen.relu(conv(x))
        x = drop(x, 0.4 if "rate" in wrong else 0.5, train)
        x = linen.relu(conv(x))
        x = drop(x, 0.25, train, () if "elements" in wrong else (1, 2))
        x = x + drop_path(self, linen.relu(conv(x)), 0.2, train)
        if "extra" in wrong:
            x = drop(x, 0.1, train)
        x = linen.relu(linen.Dense(8)(x.mean((1, 2))))
        if "missing" not in wrong:
            x = drop(x, 0.5, train)
        x = linen.relu(linen.Dense(8)(x))
        x = drop(x, 0.5, train) * (0.5 if train and "unscaled" in wrong else 1.0)
        return linen.Dense(4)(x)


def in_torch():
    from torchvision.ops import StochasticDepth

    def body(net, x):
        x = net.drop1(F.relu(net.conv1(x)))
        x = net.drop2(F.relu(net.conv2(x)))
        x = x + net.depth(F.relu(net.conv3(x)))
        x = F.dropout(F.relu(net.dense(x.mean((2, 3)))), 0.5, net.training)
        return net.head(net.drop3(F.relu(net.wide(x))))

    return Torch(
        body, conv1=nn.Conv2d(3, 6, 3, padding=1), drop1=nn.Dropout(0.5),
        conv2=nn.Conv2d(6, 6, 3, padding=1), drop2=nn.Dropout2d(0.25),
        conv3=nn.Conv2d(6, 6, 3, padding=1), depth=StochasticDepth(0.2, "row"),
        dense=nn.Linear(6, 8), wide=nn.Linear(8, 8), drop3=nn.Dropout(0.5, inplace=True),
        head=nn.Linear(8, 4),
    )  # fmt: skip


def test_dropout_of_every_kind_takes_the_same_masks():
    report = compare_models(Port(), in_torch(), image_size=SIZE)
    assert report.verdict == "equal", str(report)
    assert not report.notes


@pytest.mark.control
def test_each_wrong_dropout_is_named():
    wrong = "rate", "elements", "extra", "missing", "unscaled"
    report = compare_models(Port(wrong), in_torch(), image_size=SIZE)
    assert report.groups() == {
        "the dropout rate is 0.4 instead of 0.5": ["drop1"],
        "dropout drops elements instead of whole channels": ["drop2"],
        "JAX drops values of the input at a rate of 0.1, PyTorch does not": ["mean"],
        "there is no dropout here": ["dropout"],
        "dropout does not divide by the share of the values that it keeps": ["drop3"],
    }
    assert report.explained, str(report)


def dense_nnx():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(jax.nn.relu(self.first(x.mean((1, 2))))))

    return Net()


def dense_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x, is_training):
        x = jax.nn.relu(hk.Linear(8)(x.mean((1, 2))))
        return hk.Linear(4)(hk.dropout(hk.next_rng_key(), 0.3, x) if is_training else x)

    return hk.transform(forward)


def dense_equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0))

    class Net(eqx.Module):
        first: eqx.nn.Linear
        drop: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __call__(self, x, key):
            return self.last(self.drop(jax.nn.relu(self.first(x.mean((1, 2)))), key=key))

    first, last = eqx.nn.Linear(3, 8, key=keys[0]), eqx.nn.Linear(8, 4, key=keys[1])
    return Net(first, eqx.nn.Dropout(0.3), last)


def dense_plain():
    """A function that draws what it drops instead of what it keeps."""

    def apply(variables, x, train):
        x = jax.nn.relu(x.mean((1, 2)) @ variables["first"])
        if train:
            x = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.3, x.shape), 0, x / 0.7)
        return x @ variables["last"], variables

    return apply, {"first": jnp.zeros((3, 8)), "last": jnp.zeros((8, 4))}


@pytest.mark.control
@pytest.mark.parametrize("port", [dense_nnx, dense_haiku, dense_equinox, dense_plain])
def test_dropout_of_every_framework_takes_the_same_masks(port):
    def twin(rate):
        def body(net, x):
            x = F.relu(net.first(x.mean((2, 3))))
            return net.last(F.dropout(x, rate, net.training))

        bias = port is not dense_plain
        return Torch(body, first=nn.Linear(3, 8, bias), last=nn.Linear(8, 4, bias))

    assert compare_models(port(), twin(0.3), image_size=SIZE).verdict == "equal"
    report = compare_models(port(), twin(0.1), image_size=SIZE)
    assert report.groups() == {"the dropout rate is 0.3 instead of 0.1": ["dropout"]}


def attending(broadcast: bool):
    """Attention whose weights are dropped, for all heads and images at once or for each."""

    def body(x, train):
        x = linen.Dense(8)(x.mean(1))
        options = {"dropout_rate": 0.4, "broadcast_dropout": broadcast}
        x = linen.MultiHeadDotProductAttention(2, **options)(x, deterministic=not train)
        return linen.Dense(4)(x.mean(1))

    return Linen(body)


def attending_in_torch():
    def body(net, x):
        x = net.dense(x.mean(2).transpose(1, 2))
        return net.head(net.attention(x, x, x, need_weights=False)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
    return Torch(body, dense=nn.Linear(3, 8), attention=attention, head=nn.Linear(8, 4))


@pytest.mark.control
def test_dropout_of_attention_takes_the_same_masks():
    size = {"image_size": SIZE}
    report = compare_models(attending(False), attending_in_torch(), **size)
    assert report.verdict == "equal", str(report)
    report = compare_models(attending(True), attending_in_torch(), **size)
    cause = "dropout drops all values along the axes 0 and 1 together instead of elements"
    assert report.groups() == {cause: ["attention"]}


@pytest.mark.control
def test_masks_that_cannot_be_shared_are_told():
    def apply(variables, x, train):
        x = jax.nn.relu(x.mean((1, 2)) @ variables["first"])
        noise = jax.random.uniform(jax.random.key(0), (3, 8)) if train else 0
        return (x + jnp.sum(noise)) @ variables["last"], variables

    def body(net, x):
        x = F.relu(net.first(x.mean((2, 3))))
        return net.last(F.dropout(x, 0.3, net.training))

    first, last = nn.Linear(3, 8, bias=False), nn.Linear(8, 4, bias=False)
    report = compare_models(
        (apply, dense_plain()[1]), Torch(body, first=first, last=last), image_size=SIZE
    )
    assert report.verdict == "divergent" and not report.explained
    text = "the masks of dropout before last could not be shared: PyTorch's 5x8, JAX's 3x8"
    assert report.notes == [text]


def drawing_from(keys):
    """A function whose dropouts draw from these keys, and drop at these rates."""

    def apply(variables, x, train):
        x = x.mean((1, 2))
        for (key, rate), kernel in zip(keys, variables["hidden"], strict=True):
            x = jax.nn.relu(x @ kernel)
            if train:
                kept = jax.random.bernoulli(jax.random.key(key), 1 - rate, x.shape)
                x = jnp.where(kept, x / (1 - rate), 0) if rate < 1 else jnp.zeros_like(x)
        return x @ variables["last"], variables

    kernels = [jnp.zeros((size, 8)) for size in (3, *[8] * (len(keys) - 1))]
    return apply, {"hidden": kernels, "last": jnp.zeros((8, 4))}


def scanned(split: bool):
    """Two layers of one scan, whose dropouts have keys of their own or one for both."""

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.relu(linen.Dense(8, use_bias=False)(x))
            return linen.Dropout(0.3, deterministic=not train)(x), None

    def body(x, train):
        keys = {"params": True, "dropout": split}
        layers = linen.scan(
            Layer, {"params": 0}, split_rngs=keys, length=2, in_axes=linen.broadcast
        )
        x = linen.relu(linen.Dense(8, use_bias=False)(x.mean((1, 2))))
        return linen.Dense(4, use_bias=False)(layers()(x, train)[0])

    return Linen(body)


def dropping(*rates):
    def body(net, x):
        x = x.mean((2, 3))
        for rate, layer in zip(rates, net.hidden, strict=True):
            x = F.dropout(F.relu(layer(x)), rate, net.training)
        return net.last(x)

    sizes = (3, *[8] * (len(rates) - 1))
    hidden = nn.ModuleList(nn.Linear(size, 8, bias=False) for size in sizes)
    return Torch(body, hidden=hidden, last=nn.Linear(8, 4, bias=False))


@pytest.mark.control
def test_two_masks_of_one_key_are_named():
    named = {
        "JAX draws from the key of an earlier dropout, so both drop the same places": ["dropout"]
    }

    def compared(port, rates=(0.3, 0.3)):
        return compare_models(port, dropping(*rates), image_size=SIZE)

    assert compared(drawing_from([(0, 0.3), (1, 0.3)])).verdict == "equal"
    report = compared(drawing_from([(0, 0.3), (0, 0.3)]))
    assert report.groups() == named and report.explained, str(report)
    assert compared(scanned(split=True), (0, 0.3, 0.3)).verdict == "equal"
    assert compared(scanned(split=False), (0, 0.3, 0.3)).groups() == named


def test_a_dropout_of_everything_is_compared():
    port, rates = drawing_from([(0, 0.3), (1, 1.0)]), (0.3, 1.0)
    assert compare_models(port, dropping(*rates), image_size=SIZE).verdict == "equal"
    assert compare_models(port, dropping(0.3, 0.5), image_size=SIZE).verdict == "divergent"
