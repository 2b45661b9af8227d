"""Foreign networks without faults equal their PyTorch networks; each fault changes the program."""

import re
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from equivalence_tests.mutants import foreign_networks
from equivalence_tests.mutants.foreign_networks import in_torch, pairs_nnx, pairs_torch
from equivalence_tests.parity.ports.adapters import adapt

SHAPE = (3, 20, 16, 3)
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
ROLES = {
    "kernel": "weight", "w": "weight", "scale": "weight", "b": "bias",
    "mean": "running_mean", "var": "running_var",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


def in_jax(framework, faults=None, **settings):
    pytest.importorskip("flax" if framework in ("nnx", "linen") else framework)
    module = import_module(f"{foreign_networks.__name__}.in_{framework}")
    return getattr(module, "net", getattr(module, "Net", None))(faults or {}, **settings)


def distinct(model):
    """Draws all weights and statistics anew, in float64."""
    torch.manual_seed(0)
    for tensor in model.double().state_dict().values():
        if tensor.ndim > 1:
            tensor.normal_(0.0, tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


def arrays(model):
    """The state dict; attention's projections are apart, under NNX's names."""
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if "in_proj" in name]:
        for part, array in zip(
            ("query", "key", "value"), np.split(state.pop(name), 3), strict=True
        ):
            state[re.sub("in_proj_", f"{part}.", name)] = array
    return {name.replace("out_proj", "out"): state[name] for name in state}


def place(state, variables, turned):
    """The variables with PyTorch's weights, found by names, and how many of them were placed."""
    names = {name.replace("_", "."): name for name in state}
    placed = set()

    def value(path, leaf):
        if (name := names.get(plain_name(path))) is None:
            return leaf
        placed.add(name)
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(state[name].ndim) if turned else None
        return jnp.asarray(state[name].transpose(axes) if axes else state[name]).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(value, variables), len(placed)


def plain_name(path) -> str:
    text = jax.tree_util.keystr(path).removesuffix(".value")
    parts = re.findall(r"\w[\w.]*", text)
    parts = [part for part in parts if part not in ("layers", "params", "batch_stats")]
    parts[-1] = ROLES.get(parts[-1], parts[-1])
    return ".".join(parts[parts[0] in ("0", "1") :]).replace("_", ".")


def assert_equal_pair(net, model, *, turned=True, with_state=lambda variables, state: variables):
    model, network = distinct(model), adapt(net, SHAPE)
    state = {name: array for name, array in arrays(model).items() if "num_batches" not in name}
    variables, placed = place(state, network.variables, turned)
    variables = with_state(variables, state)
    images = np.random.default_rng(0).normal(size=SHAPE)
    for train in False, True:
        expected = model.train(train)(torch.from_numpy(images).permute(0, 3, 1, 2))
        run = jax.jit(network.apply, static_argnums=2)
        logits, after = run(variables, jnp.asarray(images), train)
        np.testing.assert_allclose(logits, expected.detach(), **CLOSE)
    wanted = with_state(place(arrays(model), variables, turned)[0], arrays(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), after, wanted)
    return len(state) - placed


@pytest.mark.parametrize("framework", ["nnx", "linen", "haiku"])
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"activation": "gelu", "stem": 7}, marks=pytest.mark.slow)],
    ids=["plain", "gelu"],
)
def test_a_foreign_resnet_equals_pytorch(framework, settings):
    unplaced = assert_equal_pair(in_jax(framework, **settings), in_torch.Net(**settings))
    assert unplaced == 0


def test_the_equinox_resnet_equals_pytorch():
    net, empty = in_jax("equinox")

    def with_state(variables, state):
        filled = jax.tree.map(lambda x: x, empty)
        for name, layer in net.layers.items():
            if hasattr(layer, "statistics"):
                both = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
                filled = filled.set(layer.statistics, both)
        return variables[0], filled

    unplaced = assert_equal_pair((net, empty), in_torch.Net(), turned=False, with_state=with_state)
    assert unplaced == 2 * sum(hasattr(layer, "statistics") for layer in net.layers.values())


def attention(query, key, value, **_):
    """Attention in the precision of its inputs."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


@pytest.mark.parametrize("name", pairs_torch.NETWORKS)
def test_networks_of_other_kinds_equal_pytorch(name):
    settings = {"attention": attention} if name == "vit" else {}
    net = pairs_nnx.NETWORKS[name](nnx.Rngs(foreign_networks.key()), **settings)
    assert assert_equal_pair(net, pairs_torch.NETWORKS[name]()) == 0


def program(net) -> str:
    images = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    if hasattr(net, "init"):  # shapes are enough, and drawing the weights takes seconds
        variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, True), images)
        net = (net, *variables) if isinstance(variables, tuple) else (net, variables)
    network = adapt(net, SHAPE)
    modes = [partial(network.apply, train=train) for train in (False, True)]
    return str([jax.make_jaxpr(mode)(network.variables, images) for mode in modes])


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["nnx", "linen", "haiku", "equinox"])
def test_each_fault_changes_the_program(framework):
    last = {fault: layer for layer, fault in foreign_networks.eligible()}
    with jax.enable_x64(False):
        right = program(in_jax(framework))
        same = [f for f, layer in last.items() if program(in_jax(framework, {layer: f})) == right]
    assert not same and len(last) >= 12


def test_faults_are_in_each_layer_that_can_have_them():
    of_relu, of_gelu = foreign_networks.eligible(), foreign_networks.eligible("gelu", 7)
    assert {fault for _, fault in of_gelu} - {fault for _, fault in of_relu} == {"tanh"}
    same = [layer for layer, fault in of_relu if fault == "SAME padding"]
    assert same == ["maxpool", "conv1", "layer2.0.conv1", "layer3.0.conv1"]
    later = [layer for layer, fault in of_relu if fault == "stride in the next"]
    assert later == ["layer2.0.conv1", "layer3.0.conv1"]
