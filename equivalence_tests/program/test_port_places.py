"""Parameters that lie in JAX otherwise than one to one: patches, joined kernels, shared layers."""

import json

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equivalence_tests.parity import compare_models
from equivalence_tests.parity.ports import cases, exported, mapping_file, options
from equivalence_tests.parity.ports.mapping import Mapping, Piece
from equivalence_tests.program.test_port_kinds import Linen, Torch
from flax_resnet.errors import InputError

pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


SIZE = (4, 6)
"""Height and width of the images, which are cut into six patches of 2 x 2 pixels."""


def patched(axes):
    """A plain network that multiplies flattened patches by a matrix.

    Args:
      axes: order in which a patch's rows (2), columns (4) and channels (5) are flattened.
    """

    def apply(variables, x, train):
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, *axes)
        x = jax.nn.relu(x.reshape(n, -1, 4 * c) @ variables["patches"])
        return x.mean(1) @ variables["head"], variables

    return apply, {"patches": jnp.zeros((12, 8)), "head": jnp.zeros((8, 4))}


def scrambled():
    """The same without the transpose: a patch is a part of a row."""
    _, variables = patched((2, 4, 5))

    def apply(variables, x, train):
        x = jax.nn.relu(x.reshape(len(x), -1, 12) @ variables["patches"])
        return x.mean(1) @ variables["head"], variables

    return apply, variables


def patched_in_torch():
    return Torch(
        lambda net, x: net.head(F.relu(net.patches(x)).mean((2, 3))),
        patches=nn.Conv2d(3, 8, 2, 2, bias=False), head=nn.Linear(8, 4, bias=False),
    )  # fmt: skip


@pytest.mark.parametrize(("axes", "order"), [((2, 4, 5), "row, column, channel"), ((5, 2, 4), "")])
def test_a_matrix_of_patches_is_a_convolution(axes, order):
    report = compare_models(patched(axes), patched_in_torch(), image_size=SIZE)
    assert report.verdict == "equal", str(report)
    assert report.notes == [f"patches.weight takes the values of a patch in the order {order}"] * (
        order > ""
    )


@pytest.mark.control
def test_patches_that_are_none_are_found():
    report = compare_models(scrambled(), patched_in_torch(), image_size=SIZE)
    assert report.verdict == "divergent" and report.faults[0].module == "patches"


@pytest.mark.control
def test_a_converter_with_another_order_inside_a_patch_is_named():
    def convert(state):
        matrix = state["patches.weight"].numpy().reshape(8, 12).T  # channel, row, column
        return {"patches": matrix, "head": state["head.weight"].numpy().T}

    report = compare_models(
        patched((2, 4, 5)), patched_in_torch(), image_size=SIZE, converter=convert
    )
    causes = set(report.groups())
    assert report.verdict == "divergent" and report.explained, str(report)
    assert causes == {"the kernel's values of a patch are read in the order row, column, channel"}
    assert "puts patches.weight into ['patches'] in another order" in report.notes[0]


@pytest.mark.parametrize("rows", [[0, 1, 2, 1], [0, 3, 3, 5]])
def test_a_table_whose_rows_are_read_many_times_is_placed(rows):
    """Attention reads its biases of relative positions in this way."""

    def apply(variables, x, train):
        x = x.mean((1, 2)) @ variables["head"] + variables["table"][np.array(rows)].reshape(-1)
        return jax.nn.relu(x) @ variables["last"], variables

    shapes = {"head": (3, 8), "table": (6, 2), "last": (8, 4)}
    net = Torch(
        lambda net, x: net.last(F.relu(net.head(x.mean((2, 3))) + net.table.weight[rows].view(8))),
        head=nn.Linear(3, 8, bias=False), table=nn.Embedding(6, 2),
        last=nn.Linear(8, 4, bias=False),
    )  # fmt: skip
    port = apply, {name: jnp.zeros(shape) for name, shape in shapes.items()}
    report = compare_models(port, net, image_size=SIZE)
    assert report.verdict == "equal", str(report)


@pytest.mark.control
def test_a_converter_that_flattens_another_layout_is_the_cause():
    def apply(variables, x, train):
        x = jax.nn.relu(x).reshape(len(x), -1) @ variables["w"]
        return x, variables

    net = Torch(lambda net, x: net.head(F.relu(x).flatten(1)), head=nn.Linear(72, 4, bias=False))
    given = {"converter": lambda state: {"w": state["head.weight"].numpy().T}}
    report = compare_models((apply, {"w": jnp.zeros((72, 4))}), net, image_size=SIZE, **given)
    cause = (
        "the converter puts head.weight into ['w'] in another order than the network's structure"
    )
    assert report.groups() == {cause: ["head"]}


@pytest.mark.parametrize("leaf", ["w", torch.zeros(3, 4)])
def test_a_converter_of_no_arrays_is_refused(leaf):
    net = dense_in_torch(lambda net, x: net.head(x.mean((2, 3))))
    with pytest.raises(InputError, match=r"returns a \w+ for \['w'\], no array"):
        compare_models(dense(), net, image_size=SIZE, converter=lambda state: {"w": leaf})


@pytest.mark.control
def test_equal_networks_with_other_optimizers_are_told_so():
    net = dense_in_torch(lambda net, x: net.head(x.mean((2, 3))))
    given = {"image_size": SIZE, "optax_optimizer": optax.sgd(0.1)}
    report = compare_models(
        dense(), net, torch_optimizer=lambda p: torch.optim.SGD(p, 0.2), **given
    )
    assert report.sentence().startswith("divergent: no layer differs, but the optimizers differ")
    with pytest.raises(InputError, match="torch_optimizer returns a int"):
        compare_models(dense(), net, torch_optimizer=lambda p: 5, **given)


def attending(scale):
    """Attention with one kernel for query, key and value of both heads."""

    def body(x, train):
        x = linen.Conv(8, (2, 2), 2, padding="VALID")(x).reshape(len(x), -1, 8)
        q, k, v = jnp.unstack(linen.DenseGeneral((2, 3, 4))(x), axis=3)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale)
        x = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape)
        return linen.Dense(4)(x.mean(1))

    return Linen(body)


def attending_in_torch():
    def body(net, x):
        x = net.patches(x).flatten(2).transpose(1, 2)
        heads = [f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (net.q, net.k, net.v)]
        return net.head(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2).mean(1))

    three = {name: nn.Linear(8, 8) for name in "qkv"}
    return Torch(body, patches=nn.Conv2d(3, 8, 2, 2), **three, head=nn.Linear(8, 4))


@pytest.mark.control
def test_one_kernel_in_place_of_three_is_placed_written_and_read(tmp_path):
    file = tmp_path / "mapping.json"
    given = {"image_size": (9, 13), "mapping": file}
    assert compare_models(attending(0.5), attending_in_torch(), **given).verdict == "equal"
    entries = json.loads(file.read_text())
    assert [block["place"][0] for block in entries["k.weight"]] == [4]
    assert None not in entries.values()
    assert compare_models(attending(0.5), attending_in_torch(), **given).verdict == "equal"
    entries["k.weight"], entries["v.weight"] = entries["v.weight"], entries["k.weight"]
    file.write_text(json.dumps(entries))
    assert compare_models(attending(0.5), attending_in_torch(), **given).verdict == "divergent"


@pytest.mark.control
def test_attention_without_its_scale_is_named():
    report = compare_models(attending(1.0), attending_in_torch(), image_size=SIZE)
    cause = "the scores are not divided by the root of the width of a head"
    assert list(report.groups()) == [cause] and report.explained


STATE = {"a": np.zeros((2, 3)), "b": np.zeros((2, 3)), "count": np.zeros((), np.int64)}
LEAVES = {"['a']": np.zeros((3, 2)), "['b']": np.zeros((3, 2)), "['n']": np.zeros(6, np.int32)}
BLOCK = {"leaf": "['b']", "shape": [2, 3], "tensor": [0, [3, 1]], "place": [0, [1, 2]]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no JSON object"),
        ({"c": None}, "c: PyTorch's network has no such tensor"),
        ({"count": {"leaf": "['n']", "axes": []}}, "count: this tensor holds no floats"),
        ({"a": {"leaf": "['n']", "axes": [1, 0]}}, "holds no floats"),
        ({"a": {"leaf": "['c']", "axes": [1, 0]}}, "no leaf"),
        ({"a": {"leaf": ["['a']"], "axes": [1, 0]}}, "no leaf"),
        ({"a": {"leaf": "['a']", "axes": [1, 1]}}, "`axes` is no order of 2 axes"),
        ({"a": {"leaf": "['a']", "axes": [True, False]}}, "`axes` is no order"),
        ({"a": {"leaf": "['a']", "axes": ["x", 0]}}, "`axes` is no order"),
        ({"a": {"leaf": "['a']"}}, "an object with leaf, axes is expected"),
        ({"a": 7}, "an object with leaf, axes"),
        ({"a": [7]}, "an object with leaf, shape, tensor, place"),
        ({"a": [BLOCK | {"shape": [2, 0]}]}, "`shape` is"),
        ({"a": [BLOCK | {"shape": [10**6, 10**6]}]}, "more than tensor or leaf"),
        ({"a": [BLOCK | {"tensor": [0, [4, 1]]}]}, "reaches beyond the 6 elements"),
        ({"a": [BLOCK | {"tensor": [0, [10**400, 1]]}]}, "not \\[start, one step"),
        ({"a": [BLOCK | {"place": [0, [1]]}]}, "not \\[start, one step"),
        ({"a": [BLOCK | {"place": [0, [0, 0]]}]}, "\\['b'\\] are taken twice"),
        ({"a": [BLOCK, BLOCK]}, "the tensor are taken twice"),
        ({"a": [BLOCK], "b": {"leaf": "['b']", "axes": [1, 0]}}, "b: elements of \\['b'\\] are"),
    ],
)
def test_a_mapping_that_is_none_is_refused_by_name(entries, message, tmp_path):
    file = tmp_path / "mapping.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        mapping_file.read(file, STATE, LEAVES)


def test_blocks_say_where_every_element_is(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "mapping.json"
    theirs = np.arange(48).reshape(2, 3, 8)[:, 1].reshape(-1)
    pieces = [Piece("['x']", rng.permutation(16), theirs), Piece("['y']", np.arange(32) // 2 * 3 +
              np.arange(32) % 2, np.setdiff1d(np.arange(48), theirs))]  # fmt: skip
    mapping_file.write(file, Mapping({"w": pieces}, {}, {}, [], {}), {"w": np.zeros((6, 8))})
    leaves = {"['x']": np.zeros(16), "['y']": np.zeros(48)}
    found = mapping_file.read(file, {"w": np.zeros((6, 8))}, leaves)["w"]

    def places(parts):
        return {(p.leaf, a, b) for p in parts for a, b in zip(p.ours, p.theirs, strict=True)}

    assert places(found) == places(pieces) and len(found) < 20


def three_times(own: bool):
    """Three residual layers, each with a kernel of its own or all with one."""

    def body(x, train):
        x, shared = linen.Conv(6, (3, 3), padding=1)(x), linen.Conv(6, (3, 3), padding=1)
        for _ in range(3):
            x = x + linen.relu((linen.Conv(6, (3, 3), padding=1) if own else shared)(x))
        return linen.Dense(4)(x.mean((1, 2)))

    def in_torch(net, x):
        x = net.stem(x)
        for layer in net.layers if own else [net.layers[0]] * 3:
            x = x + F.relu(layer(x))
        return net.head(x.mean((2, 3)))

    layers = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3 if own else 1))
    stem = nn.Conv2d(3, 6, 3, padding=1)
    return Linen(body), Torch(in_torch, stem=stem, layers=layers, head=nn.Linear(6, 4))


@pytest.mark.control
def test_layers_that_only_one_side_shares_are_named():
    shared, own = three_times(own=False), three_times(own=True)
    size = {"image_size": (5, 6)}
    assert compare_models(*shared, **size).verdict == "equal"
    report = compare_models(own[0], shared[1], **size)
    assert set(report.groups()) == {
        f"JAX has 3 parameters in place of layers.0.{kind}, which several layers use"
        for kind in ("weight", "bias")
    }
    report = compare_models(shared[0], own[1], **size)
    named = "JAX uses ['params']['Conv_1']['kernel'] here, which is another layer's, too"
    assert report.groups()[named] == ["layers.1", "layers.2"]


def test_layers_of_every_form_are_equal():
    """A norm without bias, a transposed convolution, a constant buffer, a ReLU of a ReLU, and a
    parameter that nothing uses."""

    def body(x, train):
        x = linen.Conv(6, (3, 3), padding=1)((x - 0.485) / 0.229)
        x = linen.LayerNorm(epsilon=1e-5, use_bias=False)(x)
        x = linen.ConvTranspose(6, (4, 4), (2, 2), padding=((2, 2), (2, 2)))(linen.relu(x))
        x = linen.GroupNorm(3, epsilon=1e-5, use_bias=False)(x)
        return linen.Dense(4)(linen.relu(x).mean((1, 2)))

    def in_torch(net, x):
        x = net.conv((x - net.mean) / 0.229).permute(0, 2, 3, 1)
        x = net.spread(F.relu(net.norm(x)).permute(0, 3, 1, 2))
        x = F.group_norm(x, 3, net.scale)
        return net.head(F.relu(F.relu(x)).mean((2, 3)))

    net = Torch(
        in_torch, conv=nn.Conv2d(3, 6, 3, padding=1), norm=nn.LayerNorm(6, bias=False),
        spread=nn.ConvTranspose2d(6, 6, 4, 2, 1), head=nn.Linear(6, 4), unused=nn.Linear(7, 7),
        scale=nn.Parameter(torch.ones(6)),
    )  # fmt: skip
    net.register_buffer("mean", torch.tensor(0.485).reshape(1, 1, 1))
    report = compare_models(Linen(body), net, image_size=(5, 6))
    assert report.verdict == "equal", str(report)
    assert set(report.mapping.unplaced) == {"unused.weight", "unused.bias", "mean"}
    assert report.notes == ["spread.weight lies in its leaf rotated by 180 degrees"]


@pytest.mark.control
def test_a_parameter_of_half_the_values_is_placed_and_a_written_eps_is_named():
    def body(x, train):
        for _ in range(2):
            x = linen.RMSNorm(epsilon=1e-6)(linen.Conv(6, (3, 3), padding=1)(x))
        x = linen.Conv(6, (3, 3), padding=1)(x)
        return linen.Dense(4)(linen.PReLU()(x).mean((1, 2)))

    def in_torch(net, x):
        x = net.norm(net.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = net.second(x)
        x = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * net.scale
        return net.head(net.leak(net.third(x)).mean((2, 3)))

    net = Torch(
        in_torch, first=nn.Conv2d(3, 6, 3, padding=1), norm=nn.RMSNorm(6, eps=1e-5),
        second=nn.Conv2d(6, 6, 3, padding=1), scale=nn.Parameter(torch.ones(6, 1, 1)),
        third=nn.Conv2d(6, 6, 3, padding=1), leak=nn.PReLU(), head=nn.Linear(6, 4),
    )  # fmt: skip
    report = compare_models(Linen(body), net, image_size=(5, 6))
    assert report.groups() == {"eps is 1e-06 instead of 1e-05": ["norm", "add"]}, str(report)
    assert report.explained and not report.mapping.unplaced


@pytest.mark.control
def test_norms_over_other_axes_and_branches_in_another_order_are_named():
    def body(x, train):
        x = linen.GroupNorm(3, epsilon=1e-5)(linen.Conv(6, (3, 3), padding=1)(x))
        x = linen.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True)(linen.relu(x))
        x = linen.LayerNorm(epsilon=1e-5, reduction_axes=(1, 2, 3))(x)
        return linen.Dense(4)(jnp.concatenate([x.max((1, 2)), x.mean((1, 2))], 1))

    def in_torch(net, x):
        x = net.spread(F.relu(net.groups(net.conv(x)))).permute(0, 2, 3, 1)
        x = net.norm(x)
        return net.head(torch.cat([x.mean((1, 2)), x.amax((1, 2))], 1))

    net = Torch(
        in_torch, conv=nn.Conv2d(3, 6, 3, padding=1), groups=nn.GroupNorm(2, 6),
        spread=nn.ConvTranspose2d(6, 6, 3, 2, 1, output_padding=1), norm=nn.LayerNorm(6),
        head=nn.Linear(12, 4),
    )  # fmt: skip
    report = compare_models(Linen(body), net, image_size=(5, 6))
    assert report.explained, str(report)
    assert report.groups() == {
        "the GroupNorm has 3 groups instead of 2": ["groups"],
        'the padding is "SAME"': ["spread"],
        "the LayerNorm is over all axes but the batch's": ["norm"],
        "the branches are joined in another order": ["cat"],
    }


def dense(body=lambda x: x):
    """A port with one dense layer after a global average, and what `body` does to its logits."""

    def apply(variables, x, train):
        return body(x.mean((1, 2)) @ variables["w"]), variables

    return apply, {"w": jnp.zeros((3, 4))}


def dense_in_torch(body):
    return Torch(body, head=nn.Linear(3, 4, bias=False))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda net, x: net.head(x.mean((2, 3)) + torch.rand(3)), "random numbers in evaluation"),
        (lambda net, x: None, "returns NoneType, not logits"),
        (lambda net, x: x, r"returns \[5, 3, 4, 6\], not logits \[5, classes\]"),
        (lambda net, x: net.head(x.flatten(1)), "raises on images of 4x6x3: RuntimeError"),
    ],
    ids=["drawing", "nothing", "images", "other images"],
)
def test_networks_of_pytorch_that_cannot_be_followed_are_refused(body, message):
    with pytest.raises(InputError, match=message):
        compare_models(dense(), dense_in_torch(body), image_size=SIZE)


def test_channels_are_tried_for_a_network_without_kernels():
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4))
    assert cases.image_shape(net, None) == cases.image_shape(net, (28, 28)) == (28, 28, 1)


@pytest.mark.control
def test_logits_times_a_number_and_channels_in_reverse_are_named():
    net = dense_in_torch(lambda net, x: net.head(x.mean((2, 3))))
    report = compare_models(dense(lambda x: 2 * x), net, image_size=SIZE)
    assert list(report.groups()) == ["the network returns its logits times 2"]

    def body(x, train):
        x = linen.relu(linen.Conv(6, (3, 3), padding=1)(x[..., ::-1]))
        return linen.Dense(4)(x.mean((1, 2)))

    net = Torch(lambda net, x: net.head(F.relu(net.conv(x)).mean((2, 3))),
                conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))  # fmt: skip
    report = compare_models(Linen(body), net, image_size=SIZE)
    assert list(report.groups()) == ["the input channels are in reverse order (BGR for RGB)"]


def test_a_relu_is_asked_for_both_signs_unless_no_input_could_be_negative():
    twice = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU())
    shifted = Torch(lambda net, x: F.relu(F.relu(x) + 1 - 0.5).mean((2, 3)))
    images = np.random.default_rng(0).standard_normal((4, 4, 6, 3))
    for net, found in (twice, False), (shifted, True):
        net = nn.Sequential(net, nn.Flatten()).double()
        graph = exported.graph(net, (4, 3, 4, 6), train=False)
        state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
        assert any("one sign" in why for why in cases.faults(state, graph, images)) == found


@pytest.mark.parametrize(
    ("given", "size"), [(32, (32, 32)), ((32,), (32, 32)), ([32, 40], (32, 40)), (None, None)]
)
def test_a_size_is_one_number_or_two(given, size):
    assert options.size(given) == size and options.size(np.int64(7)) == (7, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": "32"}, "image_size is '32'"),
        ({"image_size": (8, 8, 3)}, "image_size is \\(8, 8, 3\\)"),
        ({"image_size": 7.5}, "image_size is 7.5"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": {8, 9}}, "image_size is {8, 9}"),
        ({"batch": "5"}, "batch is '5'"),
        ({"batch": True}, "batch is True"),
        ({"seed": -1}, "seed is -1"),
        ({"own_weights": "no"}, "own_weights is 'no'"),
        ({"converter": "convert"}, "converter is a str"),
        ({"mapping": 5}, "mapping is 5"),
        ({"mapping": "."}, "is a folder"),
        ({"mapping": "nowhere/m.json"}, "there is no folder nowhere"),
        ({"mapping": "m.json", "converter": dict}, "exclude each other"),
        ({"torch_optimizer": torch.optim.SGD}, "optax_optimizer is a NoneType"),
        ({"optax_optimizer": optax.sgd}, "optax_optimizer is a function"),
        ({"optax_optimizer": optax.sgd(1.0)}, "torch_optimizer is a NoneType"),
        ({"torch_module": nn.Flatten}, "torch_module is the class Flatten"),
        ({"torch_module": "net"}, "torch_module is a str"),
        ({"torch_module": nn.LazyConv2d(4, 3)}, "weight has no shape yet"),
        ({"torch_module": nn.LazyBatchNorm2d(affine=False)}, "running_mean has no shape yet"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(arguments, message):
    given = {"jax_net": None, "torch_module": nn.Flatten()} | arguments
    with pytest.raises(InputError, match=message):
        compare_models(**given)
