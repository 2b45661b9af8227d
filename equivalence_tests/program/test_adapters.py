"""Networks of every JAX framework become one function and its variables."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from equivalence_tests.parity import own_model
from equivalence_tests.parity.loading import load
from equivalence_tests.parity.ports import frameworks
from equivalence_tests.parity.ports.adapters import Network, adapt
from equivalence_tests.program.test_export import SlowToFold
from flax_resnet.errors import InputError

SHAPE = (4, 6, 5, 3)
KEY = jax.random.key(0, impl="unsafe_rbg")  # this generator compiles in a moment


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(KEY)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(1, 3, dropout_rate=0.5, decode=False, rngs=rngs)
        self.dense = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        x = self.attention(self.drop(self.norm(x)).mean(2))
        self.sow(nnx.Intermediate, "features", x)
        return {"features": x, "logits": self.dense(x.mean(1))}


class LinenNet(linen.Module):
    norm: linen.Module
    axis: str | None = None

    @linen.compact
    def __call__(self, x, train):
        x = self.norm(x, use_running_average=not train)
        x = linen.Dropout(0.5)(x, deterministic=not train).mean(2)
        attention = linen.MultiHeadDotProductAttention(1, dropout_rate=0.5)
        x = attention(x, deterministic=not train)
        return linen.Dense(5)(x.mean(1)), x


def linen_net(axis=None):
    return LinenNet(linen.BatchNorm(axis_name=axis))


class FieldNet(linen.Module):
    train: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.BatchNorm(use_running_average=not self.train)(x)
        return linen.Dense(5)(x.mean((1, 2)))


class Attentive(linen.Module):
    attention: linen.Module

    @linen.compact
    def __call__(self, x, deterministic):
        return self.attention(x.mean(2), deterministic=deterministic).mean(1)


def haiku_net():
    hk = pytest.importorskip("haiku")

    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
        return hk.Linear(5)(x.mean((1, 2)))

    return hk.transform_with_state(forward)


def haiku_ready():
    net = haiku_net()
    return net, *net.init(KEY, jnp.zeros(SHAPE), True)


def haiku_stateless():
    hk = pytest.importorskip("haiku")
    return hk.transform(lambda x: hk.Linear(5)(x.mean((1, 2))))


def equinox_net(axis="batch"):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        norm: eqx.Module
        drop: eqx.Module
        dense: eqx.Module

        def __call__(self, x, state, key):
            x, state = self.norm(x, state)
            x = self.drop(x, key=key)
            return self.dense(x.mean((1, 2))), state

    norm = eqx.nn.BatchNorm(3, axis, mode="ema")
    return Net(norm, eqx.nn.Dropout(0.5), eqx.nn.Linear(3, 5, key=KEY))


def equinox_pair():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.make_with_state(equinox_net)("images")


def equinox_stateless():
    eqx = pytest.importorskip("equinox")
    dense = eqx.nn.Linear(3, 5, key=KEY)
    return eqx.nn.Sequential([eqx.nn.Lambda(lambda x: x.mean((1, 2))), dense])


def keras_net():
    os.environ["KERAS_BACKEND"] = "jax"
    keras = pytest.importorskip("keras")
    of = keras.layers
    parts = of.BatchNormalization(), of.Dropout(0.5), of.GlobalAveragePooling2D(), of.Dense(5)
    return keras.Sequential(parts)


def plain():
    def apply(variables, images, train):
        logits = images.mean((1, 2)) @ variables["kernel"]
        return logits, {**variables, "steps": variables["steps"] + train}

    return apply, {"kernel": jnp.ones((3, 5)), "steps": jnp.array(0)}


pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


NETS = {
    "nnx": NnxNet, "linen": linen_net, "linen axis": lambda: linen_net("devices"),
    "linen field": FieldNet, "haiku": haiku_net, "haiku ready": haiku_ready,
    "haiku stateless": haiku_stateless, "equinox": equinox_net, "equinox pair": equinox_pair,
    "equinox stateless": equinox_stateless, "keras": keras_net, "plain": plain,
    "network": lambda: Network(*plain()),
}  # fmt: skip
STATELESS = {"haiku stateless", "equinox stateless"}


def run(network, train, dtype):
    lift = lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    variables = jax.tree.map(lift, network.variables)
    images = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, SHAPE), dtype)
    program = jax.make_jaxpr(lambda v, x: network.apply(v, x, train))(variables, images)
    assert train or ("random_bits" not in str(program) and "threefry" not in str(program))
    return jax.jit(network.apply, static_argnums=2)(variables, images, train), variables


@pytest.mark.parametrize("name", NETS)
def test_networks_of_every_framework_compute_logits_and_statistics(name):
    with jax.enable_x64(True):
        network = adapt(NETS[name](), SHAPE)
        (evaluated, kept), variables = run(network, False, jnp.float64)
        (trained, after), _ = run(network, True, jnp.float64)
    assert evaluated.shape == trained.shape == (4, 5)
    assert bool(jnp.isfinite(trained).all())
    assert all(jax.tree.leaves(jax.tree.map(equal, kept, variables)))
    assert all(jax.tree.leaves(jax.tree.map(equal, after, variables))) == (name in STATELESS)


def equal(a, b) -> bool:
    return bool((a == b).all())


def test_the_network_of_the_user_stays_as_it_was():
    net = NnxNet()
    before = nnx.clone(net)
    call = nnx.Dropout.__call__
    run(adapt(net, SHAPE), True, jnp.float32)
    assert all(jax.tree.leaves(jax.tree.map(equal, nnx.state(before), nnx.state(net))))
    assert nnx.graphdef(net) == nnx.graphdef(before) and nnx.Dropout.__call__ is call
    part = linen.MultiHeadDotProductAttention(1, dropout_rate=0.5)
    adapt(Attentive(part), SHAPE)
    assert part.dropout_rate == 0.5


def shaped(*shape):
    return lambda variables, images, train: (jnp.zeros(shape), variables)


class Unruly(nnx.Module):
    def __call__(self, images):
        raise KeyError("stem")


BAD = {
    "nothing": (None, r"not \(NoneType\)"),
    "empty": ((), r"not \(tuple\)"),
    "a class": (LinenNet, r"not \("),
    "surplus": ((FieldNet(), {}, {}), "2 values follow a FieldNet"),
    "rank": ((shaped(4, 2, 5), {}), r"returns float32\[4, 2, 5\], not logits \[4, classes\]"),
    "batch": ((shaped(3, 5), {}), r"returns float32\[3, 5\]"),
    "integers": ((lambda v, x, train: (x[:, 0, 0].astype(int), v), {}), r"returns int32\[4, 3\]"),
    "one value": ((lambda v, x, train: jnp.ones((2, 5)), {}), r"apply returns float32\[2, 5\]"),
    "text": ((lambda v, x, train: ("five", v), {}), "the network returns str"),
    "lost": ((lambda v, x, train: (x[:, 0, 0], None), {"a": jnp.ones(1)}), "other parts"),
    "leaf": ((shaped(4, 5), {"a": "five"}), "the variables hold a str"),
    "raises": (Unruly(), "the forward pass of 4x6x5x3 raises KeyError: 'stem'"),
    "signature": ((lambda v, x: (x, v), {}), "the forward pass of 4x6x5x3 raises TypeError"),
    "initialisation": (LinenNet(None), "the initialisation of LinenNet raises TypeError"),
}


@pytest.mark.parametrize("net, words", BAD.values(), ids=BAD)
def test_what_is_no_network_is_an_input_error(net, words):
    with pytest.raises(InputError, match=words):
        adapt(net, SHAPE)


PLACES = {
    "nowhere:net": "No module named 'nowhere'",
    "nets:absent": "no attribute 'absent'",
    "nets": "(package.module:callable)",
    ":": "(package.module:callable)",
    "nets:leaves": "SystemExit: 3",
    "nets:divides": "ZeroDivisionError",
}


@pytest.mark.parametrize("place, words", PLACES.items())
def test_a_callable_that_fails_is_an_input_error(tmp_path, monkeypatch, place, words):
    source = "def leaves():\n    raise SystemExit(3)\ndef divides():\n    1 / 0\n"
    (tmp_path / "nets.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    with pytest.raises(InputError) as error:
        load(place, "--jax-model")
    assert str(error.value).startswith(f"--jax-model {place}") and words in str(error.value)


TORCH_NET = """
import torch
from torch import nn
from torchvision.ops import StochasticDepth

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        drops = nn.Dropout2d(0.5), nn.AlphaDropout(0.5), StochasticDepth(0.5, "row")
        self.drops = nn.Sequential(*drops)
        self.attention = nn.MultiheadAttention(3, 1, dropout=0.5)

    def forward(self, x):
        x = self.drops(x).mean((2, 3))
        return self.attention(x, x, x)[0]
"""


def test_a_torch_network_drops_nothing(tmp_path, monkeypatch):
    (tmp_path / "torch_nets.py").write_text(TORCH_NET)
    monkeypatch.chdir(tmp_path)
    net, images = own_model.load("torch_nets:Net"), torch.ones(4, 3, 2, 2, dtype=torch.float64)
    np.testing.assert_array_equal(net(images).detach(), net.eval()(images).detach())


def test_weights_are_drawn_without_a_word_of_the_compiler(capfd):
    frameworks._initialised(lambda key, x: SlowToFold.logits(x), None, jnp.zeros((2, 1)))
    assert capfd.readouterr().err == ""
