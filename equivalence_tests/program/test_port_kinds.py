"""Networks of other kinds than ResNets, as people write them in JAX, against PyTorch's."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F
from flax import nnx
from torch import nn

from equivalence_tests.parity import compare_models
from flax_resnet.errors import InputError

BIASED = "the running variance takes the biased variance of the batch (n instead of n - 1)"


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


class Linen(linen.Module):
    """A network of one function of a Linen module's scope and images."""

    body: object

    @linen.compact
    def __call__(self, x, train=False):
        return self.body(x, train)


class Torch(nn.Module):
    """A network of named layers and one function of them and images."""

    def __init__(self, body, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def pooled(classes=4, width=6):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def conv(x, width=6):
    return linen.Conv(width, (3, 3), padding=1)(x)


def flattening(columns_last: bool):
    def body(x, train):
        x = linen.relu(conv(x))
        x = x.reshape(len(x), -1) if columns_last else x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return linen.Dense(4)(x)

    return Linen(body), Torch(
        lambda net, x: net.head(F.relu(net.conv(x)).flatten(1)),
        conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6 * 5 * 7, 4),
    )  # fmt: skip


@pytest.mark.parametrize("columns_last", [True, False])
def test_a_flattened_image_may_lie_in_another_order(columns_last):
    report = compare_models(*flattening(columns_last), image_size=(5, 7))
    assert report.verdict == "equal", str(report)
    assert any("in another order" in note for note in report.notes) == columns_last


def test_stacked_kernels_of_a_scan_are_placed_slice_by_slice():
    def convolved(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)
        return jax.nn.relu(y)

    def apply(variables, x, train):
        x = convolved(x, variables["stem"])
        x, _ = jax.lax.scan(lambda x, kernel: (x + convolved(x, kernel), None), x, variables["all"])
        return x.mean((1, 2)) @ variables["w"], variables

    variables = {"stem": jnp.zeros((3, 3, 3, 6)), "all": jnp.zeros((3, 3, 3, 6, 6))}
    kernels = [nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3)]

    def body(net, x):
        x = F.relu(net.stem(x))
        for kernel in net.blocks:
            x = x + F.relu(kernel(x))
        return net.head(x.mean((2, 3)))

    stem, head = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Linear(6, 4, bias=False)
    net = Torch(body, stem=stem, blocks=nn.ModuleList(kernels), head=head)
    report = compare_models((apply, variables | {"w": jnp.zeros((6, 4))}), net)
    assert report.verdict == "equal", str(report)


@pytest.mark.control
def test_a_batch_norm_without_parameters_is_no_false_alarm():
    def body(x, train):
        options = {"use_scale": False, "use_bias": False, "momentum": 0.9, "epsilon": 1e-5}
        x = linen.BatchNorm(use_running_average=not train, **options)(conv(x))
        return linen.Dense(4)(linen.relu(x).mean((1, 2)))

    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False), nn.ReLU(), *pooled()
    )
    report = compare_models(Linen(body), net)
    assert report.groups() == {BIASED: ["1"]} and report.explained


@pytest.mark.control
@pytest.mark.parametrize("end", [nnx.softmax, nnx.log_softmax])
def test_a_network_that_returns_probabilities_is_told_so(end):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *pooled())
    port = Linen(lambda x, train: end(linen.Dense(4)(linen.relu(conv(x)).mean((1, 2)))))
    report = compare_models(port, net)
    name = end.__name__.replace("_", "-")
    assert report.groups() == {f"the network returns the {name} of its logits": ["logits"]}


@pytest.mark.control
def test_a_sigmoid_in_place_of_a_hard_sigmoid_is_named():
    def body(x, train):
        x = linen.relu(conv(x))
        gate = linen.sigmoid(linen.Dense(6)(x.mean((1, 2))))
        return linen.Dense(4)((x * gate[:, None, None]).mean((1, 2)))

    def twin(net, x):
        x = F.relu(net.conv(x))
        gate = F.hardsigmoid(net.gate(x.mean((2, 3))))
        return net.head((x * gate[:, :, None, None]).mean((2, 3)))

    layers = {"conv": nn.Conv2d(3, 6, 3, padding=1), "gate": nn.Linear(6, 6)}
    report = compare_models(Linen(body), Torch(twin, **layers, head=nn.Linear(6, 4)))
    assert report.groups() == {"the gate is a sigmoid": ["hardsigmoid"]} and report.explained


def test_both_sides_may_return_logits_among_other_values():
    def body(x, train):
        x = linen.relu(conv(x)).mean((1, 2))
        return {"logits": linen.Dense(4)(x), "features": x}

    def twin(net, x):
        x = F.relu(net.conv(x)).mean((2, 3))
        return {"features": x, "logits": net.head(x)}

    net = Torch(twin, conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))
    assert compare_models(Linen(body), net).verdict == "equal"


def slow_to_fold():
    """A number whose folding takes the compiler over a second, of which it warns."""
    constant = jnp.asarray(np.random.default_rng(0).normal(size=(1, 200, 200, 1)), jnp.float32)
    window = ((1, 21, 21, 1), (1, 1, 1, 1), "SAME")
    return jax.lax.reduce_window(constant, 0.0, jax.lax.add, *window).mean()


def test_networks_are_compared_without_a_word_of_the_compiler(capfd):
    def bias(key, shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype) + slow_to_fold().astype(dtype)

    def body(x, train):
        x = linen.relu(conv(x)).mean((1, 2))
        return linen.Dense(4, bias_init=bias)(x + 0 * slow_to_fold().astype(x.dtype))

    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *pooled())
    assert compare_models(Linen(body), net).verdict == "equal"
    assert capfd.readouterr().err == ""


def test_other_numbers_of_classes_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), *pooled(classes=4))
    port = Linen(lambda x, train: linen.Dense(5)(linen.relu(conv(x)).mean((1, 2))))
    with pytest.raises(InputError, match="PyTorch's network has 4 classes, JAX's 5"):
        compare_models(port, net)


def test_a_pool_of_another_size_is_named_and_the_layers_behind_are_still_compared():
    def body(x, train):
        x = linen.max_pool(linen.relu(conv(x)), (3, 3), (2, 2))
        x = linen.relu(x + linen.Conv(6, (3, 3), padding=1)(x))
        return linen.Dense(4)(x.mean((1, 2)))

    def in_torch(net, x):
        x = net.pool(F.relu(net.first(x)))
        return net.head(F.relu(x + net.second(x)))

    torch_net = Torch(
        in_torch,
        first=nn.Conv2d(3, 6, 3, padding=1), pool=nn.MaxPool2d(3, 2, padding=1),
        second=nn.Conv2d(6, 6, 3, padding=1), head=nn.Sequential(*pooled()),
    )  # fmt: skip
    report = compare_models(Linen(body), torch_net, image_size=(11, 11))
    assert report.groups() == {"the max-pool has no padding": ["pool"]}
