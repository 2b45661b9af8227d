"""The judge of ports: finds every fault that is put in, raises no alarm, and refuses bad input."""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from equivalence_tests.mutants import foreign_networks
from equivalence_tests.mutants.foreign_networks import in_nnx, in_torch, pairs_nnx, pairs_torch
from equivalence_tests.parity import compare_models, own_model
from equivalence_tests.parity.ports import cases, exported, mapping_file, written
from equivalence_tests.program.command import run_installed
from flax_resnet.errors import InputError

pytest_plugins = ["equivalence_tests.parity.pytest_port"]


pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


class TorchCnn(nn.Module):
    """A plain CNN with two kernels of the same shape."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 2, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.third = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))))
        return self.head(x.mean((2, 3)))


PADDING = (1, 1), (1, 1)
NAMES = "first", "second", "third", "head"


def shapes(width=6):
    return {
        "first": (3, 3, 3, width), "second": (3, 3, width, width), "third": (3, 3, width, width),
        "head": (width, 4),
    }  # fmt: skip


def variables(width=6):
    return {n: {"w": jnp.zeros(s), "b": jnp.zeros(s[-1])} for n, s in shapes(width).items()}


def cnn(values, images, train, *, act=jax.nn.relu, padding=PADDING):
    """`TorchCnn` as a plain function."""
    x = act(_conv(images, values["first"], 2, padding))
    x = act(_conv(act(_conv(x, values["second"], 1)), values["third"], 1))
    return x.mean((1, 2)) @ values["head"]["w"] + values["head"]["b"], values


def _conv(x, layer, stride, padding=PADDING):
    return layer["b"] + jax.lax.conv_general_dilated(
        x, layer["w"], (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def converter(state, swap=()):
    """`TorchCnn`'s state_dict as variables."""
    names = dict(zip(NAMES, NAMES, strict=True)) | dict(swap)
    found = {}
    for name in NAMES:
        weight = state[f"{names[name]}.weight"].numpy()
        axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
        bias = state[f"{names[name]}.bias"].numpy()
        found[name] = {"w": jnp.asarray(weight.transpose(axes)), "b": jnp.asarray(bias)}
    return found


def test_a_plain_function_is_equal():
    report = compare_models((cnn, variables()), TorchCnn())
    assert report.verdict == "equal" and report.largest < 1e-12
    assert len(report.mapping.pieces) == 8 and not report.mapping.unplaced


@pytest.mark.control
def test_all_faults_of_a_network_are_found_at_once():
    faults = {
        "maxpool": "SAME padding", "bn1": "eps 1e-3", "layer1.0.bn1": "decay 0.99",
        "layer2.0.conv1": "SAME padding", "layer2.0.bn2": "biased variance",
        "layer3.0.act1": "leaky", "layer3.0.add": "ReLU before",
    }  # fmt: skip
    report = compare_models(in_nnx.Net(faults), in_torch.Net())
    assert report.verdict == "divergent" and report.explained
    assert report.groups() == {
        "eps is 0.001 instead of 1e-05": ["bn1"],
        'the max-pool pads as "SAME"': ["maxpool"],
        'the padding is "SAME"': ["layer2.0.conv1"],
        "the ReLU is leaky, with slope 0.01": ["layer3.0.relu"],
        "a ReLU stands before the addition": ["layer3.0"],
        "BatchNorm's momentum is 0.01 instead of 0.1 (a decay of 0.99)": ["layer1.0.bn1"],
        "the running variance takes the biased variance of the batch (n instead of n - 1)": [
            "layer2.0.bn2"
        ],
    }
    document = report.document()
    first = document["first"]
    assert first == document["divergent_layers"][0]
    assert (first["torch_name"], first["jax_name"]) == ("bn1", "['layers']['bn1']")
    assert (first["mode"], first["phase"]) == ("evaluation", "forward")
    assert first["causes"] == ["eps is 0.001 instead of 1e-05"] and 1e-6 < first["relative"] < 1
    assert document["unmatched"] == {"jax": [], "torch": []}


class NarrowTorch(nn.Module):
    """A network whose author wrote float32 into it."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.gelu(self.first(x.mean((2, 3)).float().double()))
        return self.head(F.softmax(x, 1, dtype=torch.float32).double())


def _narrow(values, images, train):
    """`NarrowTorch`; the root of 1/2 in GELU is a number of float32."""
    x = images.mean((1, 2)) @ values["first"]["w"] + values["first"]["b"]
    x = jax.nn.softmax(jax.nn.gelu(x.astype(jnp.float32), approximate=False))
    return x @ values["head"]["w"] + values["head"]["b"], values


def test_float32_that_an_author_wrote_is_float64_on_both_sides():
    layers = {"first": (3, 8), "head": (8, 4)}
    values = {n: {"w": jnp.zeros(s), "b": jnp.zeros(s[-1])} for n, s in layers.items()}
    report = compare_models((_narrow, values), NarrowTorch())
    assert report.verdict == "equal" and report.largest < 1e-12


@pytest.mark.parametrize(
    "number", [0.9, 1.001e-5, 0.5**0.5, -(0.5**0.5), (2 / np.pi) ** 0.5, 24**-0.5, 3.4028235e38]
)
def test_a_float32_number_is_what_its_author_wrote(number):
    assert written.lifted(np.float32(number)) == number


@pytest.mark.control
def test_a_branch_without_gradient_is_found():
    report = compare_models(in_nnx.Net({"layer1.0.add": "stopped gradient"}), in_torch.Net())
    assert report.groups() == {"no gradient passes back through add": ["layer1.0"]}
    assert report.explained


@pytest.mark.control
def test_the_gradient_of_a_maximum_is_that_of_pytorch():
    report = compare_models(in_nnx.Net({"avgpool": "maximum"}), in_torch.Net())
    assert report.groups() == {"it is a global max-pool": ["avgpool"]} and report.explained


@pytest.mark.parametrize("name", ["group norm", pytest.param("depthwise", marks=pytest.mark.slow)])
def test_networks_that_are_no_resnet_are_equal(name):
    net = pairs_nnx.NETWORKS[name](nnx.Rngs(foreign_networks.key()))
    assert compare_models(net, pairs_torch.NETWORKS[name]()).verdict == "equal"


def test_a_fused_projection_of_attention_is_placed_in_parts():
    net = pairs_nnx.NETWORKS["vit"](nnx.Rngs(foreign_networks.key()))
    report = compare_models(net, pairs_torch.NETWORKS["vit"](), image_size=(20, 16))
    assert report.verdict == "equal"
    assert len(report.mapping.pieces["blocks.0.attention.in_proj_weight"]) == 3


def test_a_right_converter_is_proven():
    assert compare_models((cnn, variables()), TorchCnn(), converter=converter).verdict == "equal"


@pytest.mark.control
def test_a_converter_that_swaps_two_equal_shapes_is_caught():
    swap = {"second": "third", "third": "second"}
    report = compare_models(
        (cnn, variables()), TorchCnn(), converter=lambda state: converter(state, swap)
    )
    assert report.verdict == "divergent"
    assert "the converter puts second.weight into ['third']['w']" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"second": v["third"]}, "second.weight, second.bias go nowhere"),
        (lambda v: jax.tree.map(lambda a: a / 3, v), "computes with the numbers"),
        (lambda v: {"other": v}, "other leaves than the network has"),
        (lambda v: v["no such"], "the converter raises KeyError"),
    ],
)
def test_a_converter_that_is_no_bijection_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        compare_models(
            (cnn, variables()), TorchCnn(), converter=lambda state: change(converter(state))
        )


@pytest.mark.control
def test_a_mapping_is_written_read_and_obeyed(tmp_path):
    file = tmp_path / "mapping.json"
    assert compare_models((cnn, variables()), TorchCnn(), mapping=file).verdict == "equal"
    entries = json.loads(file.read_text())
    assert entries["first.weight"] == {"leaf": "['first']['w']", "axes": [2, 3, 1, 0]}
    for kind in "weight", "bias":
        second, third = (f"{name}.{kind}" for name in ("second", "third"))
        entries[second], entries[third] = entries[third], entries[second]
    file.write_text(json.dumps(entries))
    assert compare_models((cnn, variables()), TorchCnn(), mapping=file).verdict == "divergent"


@pytest.mark.parametrize("content, words", [
    ("[" * 10**5, "not readable as JSON"), ("[]", "no JSON object"), (None, "is no file"),
    ('{"a": null, "a": null}', "a is given twice"),
])  # fmt: skip
def test_what_is_no_mapping_is_refused_in_a_line(tmp_path, content, words):
    file = tmp_path / "mapping.json"
    file.write_text(content) if content else os.mkfifo(file)
    with pytest.raises(InputError, match=f"mapping.json.* {words}"):
        mapping_file.read(file, {}, {})


@pytest.mark.control
def test_sizes_that_would_hide_a_padding_are_no_proof():
    def same(values, images, train):
        padded = jnp.pad(images, [(0, 0), *(_as_same(n) for n in images.shape[1:3]), (0, 0)])
        return cnn(values, padded, train, padding="VALID")

    at_33 = compare_models((same, variables()), TorchCnn(), image_size=(33, 33))
    assert at_33.verdict == "undecided" and "first sees only odd sizes" in at_33.sentence()
    found = compare_models((same, variables()), TorchCnn())
    assert found.groups() == {'the padding is "SAME"': ["first"]}


def _as_same(size: int) -> tuple[int, int]:
    """The padding of "SAME" for a window of 3 and a stride of 2."""
    return (1, 1) if size % 2 else (0, 1)


def test_fresh_weights_of_a_batch_norm_are_no_proof():
    net, images = in_torch.Net().double(), np.random.default_rng(0).standard_normal((4, 41, 44, 3))
    graph = exported.graph(net, (4, 3, 41, 44), train=False)
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    found = cases.faults(state, graph, images)
    assert "bn1.weight is constant" in found and "bn1.bias and bn1.running_mean are equal" in found


@pytest.mark.parametrize(
    ("optimizer", "verdict"),
    [
        (lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9)), "equal"),
        (lambda: optax.sgd(0.1, 0.9), "divergent"),
        (lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, 0.9, True)),
         "divergent"),
    ],
    ids=["equal", "no weight decay", "Nesterov"],
)  # fmt: skip
def test_optimizers_are_compared(optimizer, verdict):
    report = compare_models(
        (cnn, variables()), TorchCnn(), optax_optimizer=optimizer(),
        torch_optimizer=lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-2),
    )  # fmt: skip
    assert report.verdict == verdict
    assert any("momentum_buffer" in row.name for row in report.rows["training"])


def drawing(values, images, train):
    return cnn(values, images + jax.random.normal(jax.random.key(0), images.shape), train)


def calling(values, images, train):
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    return cnn(values, jax.pure_callback(lambda x: x, shape, images), train)


def keeping():
    """A network that computes with the first images of each shape and type that it gets."""
    kept = {}

    def apply(values, images, train):
        return cnn(values, kept.setdefault((images.shape, images.dtype), images), train)

    return apply


def failing(values, images, train):
    raise RuntimeError("out of paint")


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (drawing, "draws random numbers in evaluation"),
        (calling, "calls the host"),
        (keeping(), "kept from an earlier call"),
        (failing, "RuntimeError: out of paint"),
        (lambda v, x, train: x, "logits"),
        (lambda v, x, train: cnn(v, x, train, act=lambda y: y / 0), "is not finite"),
    ],
    ids=["drawing", "calling", "keeping", "failing", "images", "dividing by 0"],
)
def test_networks_that_cannot_be_followed_are_refused(apply, message):
    with pytest.raises(InputError, match=message):
        compare_models((apply, variables()), TorchCnn())


def test_an_exponent_named_p_is_no_dropout():
    class GeM(nn.Module):
        p = 3.0

    own_model.drop_nothing(net := nn.Sequential(GeM(), nn.Dropout(0.5)))
    ones = torch.ones(1, 100)
    assert net[0].p == 3.0 and torch.equal(net.train()[1](ones), ones)


@pytest.mark.control
def test_layers_that_match_nothing_are_listed():
    report = compare_models((cnn, variables(8)), TorchCnn())
    assert report.verdict == "undecided"
    text = str(report)
    assert "not in JAX: first.weight 6x3x3x3" in text and "in JAX only: ['first']['w']" in text


def test_the_fixture_passes_and_fails(assert_port_equal):
    assert_port_equal((cnn, variables()), TorchCnn())
    with pytest.raises(pytest.fail.Exception, match="the activation is"):
        tanh = lambda v, x, train: cnn(v, x, train, act=jax.nn.silu)  # noqa: E731
        assert_port_equal((tanh, variables()), TorchCnn())


MODULE = """
import jax.numpy as jnp
from equivalence_tests.program.test_ports import TorchCnn, cnn, failing, variables

def right():
    return cnn, variables()

def wrong():
    return lambda v, x, train: cnn(v, x, train, act=lambda y: jnp.maximum(y, 0.01 * y)), variables()

def raises():
    return failing, variables()
"""


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("right", 0, "equal: every tensor agrees"),
        ("wrong", 1, "it explains every difference"),
        ("raises", 2, "out of paint"),
        ("nowhere", 2, "nowhere"),
    ],
)
def test_the_command_ends_with_its_status(name, status, text, tmp_path, monkeypatch):
    (tmp_path / "my_port.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    flags = ["--jax-model", f"my_port:{name}", "--torch-model", "my_port:TorchCnn"]
    outcome = run_installed("parity", *flags, "--report", "out")
    assert outcome.status == status, outcome
    assert text in outcome.out + outcome.err
    if status < 2:
        document = json.loads((tmp_path / "out" / "parity.json").read_text())
        assert np.isfinite(document["largest"])
        assert "my_port:TorchCnn" in (tmp_path / "out" / "parity.html").read_text()
