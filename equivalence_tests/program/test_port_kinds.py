"""Networks of other kinds than ResNets, as people write them in JAX, against PyTorch's."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

from equivalence_tests.parity import compare_models
from equivalence_tests.parity.ports import exported
from flax_resnet.errors import InputError

BIASED = "the running variance takes the biased variance of the batch (n instead of n - 1)"


pytestmark = pytest.mark.usefixtures("ranks_are_promoted")


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


class Normalising(linen.Module):
    """A BatchNorm of its own over some axes, or Flax's along another axis than the channels."""

    axes: tuple[int, ...]

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(6, (3, 3), padding=1, use_bias=False)(x)
        x = self.normalised(x, train) if len(self.axes) > 1 else self.along(x, train)
        return linen.Dense(4)(linen.relu(x).mean((1, 2)))

    def along(self, x, train):
        options = {"momentum": 0.9, "epsilon": 1e-5, "axis": self.axes[0]}
        return linen.BatchNorm(use_running_average=not train, **options)(x)

    def normalised(self, x, train):
        scale, bias = (self.param(name, linen.initializers.ones, (6,)) for name in ("s", "b"))
        means, spreads = (self.variable("batch_stats", n, jnp.ones, (6,)) for n in ("m", "v"))
        mean, spread = means.value, spreads.value
        if train:
            count = x.size / 6
            means.value = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
            spreads.value = 0.9 * spread + 0.1 * x.var((0, 1, 2)) * count / (count - 1)
            mean, spread = (f(self.axes, keepdims=True) for f in (x.mean, x.var))
        return (x - mean) * jax.lax.rsqrt(spread + 1e-5) * scale + bias


@pytest.mark.control
@pytest.mark.parametrize(
    ("axes", "cause"),
    [
        ((0, 1), "BatchNorm normalises over the axes B, H instead of B, H, W"),
        ((2,), "BatchNorm has a scale and statistics for each of 7 positions along W instead of"
               " 6 channels"),
    ],
)  # fmt: skip
def test_a_batch_norm_over_other_axes_is_named(axes, cause):
    conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), *pooled())
    assert compare_models(Normalising(axes), net, image_size=(5, 7)).groups() == {cause: ["1"]}


@pytest.mark.control
def test_classes_in_another_order_and_other_constants_of_the_input_are_named():
    def normalised(x, mean, std):
        return (x - jnp.asarray(mean, x.dtype)) / jnp.asarray(std, x.dtype)

    def body(x, train):
        x = linen.relu(conv(normalised(x, (0.5, 0.5, 0.5), (0.229, 0.224, 0.225))))
        return linen.Dense(4)(x.mean((1, 2)))[:, jnp.array([0, 3, 1, 2])]

    def twin(net, x):
        x = (x - net.mean) / net.std
        return net.head(F.relu(net.conv(x)).mean((2, 3)))

    net = Torch(twin, conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))
    for name, values in ("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225]):
        net.register_buffer(name, torch.tensor(values).reshape(3, 1, 1))
    report = compare_models(Linen(body), net, image_size=(5, 7))
    std = "std (0.229, 0.224, 0.225)"
    mean = f"mean 0.5 and {std} instead of mean (0.485, 0.456, 0.406) and {std}"
    assert report.groups() == {
        f"the input is normalised by {mean}": ["div"],
        "the classes are in another order: JAX's 1, 2, 3 are PyTorch's 3, 1, 2": ["logits"],
    }


def returning(values, in_torch=lambda x, logits: logits):
    """A pair of networks, and what each returns of six features and of its logits."""

    def body(x, train):
        x = linen.relu(conv(x)).mean((1, 2))
        return values(x, linen.Dense(4)(x))

    def twin(net, x):
        x = F.relu(net.conv(x)).mean((2, 3))
        return in_torch(x, net.head(x))

    return Linen(body), Torch(twin, conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4))


@pytest.mark.parametrize("last", [lambda x, y: (x, y), lambda x, y: {"x": x[:, None], "y": y}])
def test_the_value_of_as_many_classes_is_the_logits(last):
    assert compare_models(*returning(last), image_size=(5, 7)).verdict == "equal"
    port, net = returning(lambda x, y: y, last)
    assert compare_models(port, net, image_size=(5, 7)).verdict == "equal"


def test_values_that_may_all_be_logits_are_refused_in_a_line():
    port, net = returning(lambda x, y: (x, [y]), lambda x, y: (x, y))
    message = r"several values that may be logits: \[0\] \[5, 6\], \[1\]\[0\] \[5, 4\]; return one"
    with pytest.raises(InputError, match=message):
        compare_models(port, net, image_size=(5, 7))


@pytest.mark.parametrize("own", [False, True])
def test_an_rms_norm_without_an_eps_takes_that_of_float32(own):
    def apply(variables, x, train):
        x = 1e-3 * (x.mean((1, 2)) @ variables["first"])
        eps = jnp.finfo(x.dtype).eps if own else 2.0**-23
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * variables["scale"]
        return x @ variables["head"], variables

    shapes = {"first": (3, 6), "scale": (6,), "head": (6, 4)}
    net = Torch(
        lambda net, x: net.head(net.norm(1e-3 * net.first(x.mean((2, 3))))),
        first=nn.Linear(3, 6, False), norm=nn.RMSNorm(6), head=nn.Linear(6, 4, False),
    )  # fmt: skip
    port = apply, {n: jnp.zeros(shape) for n, shape in shapes.items()}
    assert compare_models(port, net, image_size=(5, 7)).verdict == "equal"


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


def activated(function):
    return Linen(lambda x, train: linen.Dense(4)(function(conv(x)).mean((1, 2))))


def activated_in_torch(function):
    layers = {"conv": nn.Conv2d(3, 6, 3, padding=1), "head": nn.Linear(6, 4)}
    return Torch(lambda net, x: net.head(function(net.conv(x)).mean((2, 3))), **layers)


@pytest.mark.control
def test_a_bound_that_only_large_values_reach_is_found():
    def compared(function, in_torch):
        pair = activated(function), activated_in_torch(in_torch)
        return compare_models(*pair, image_size=(5, 7))

    report = compared(jax.nn.relu6, F.relu)
    assert report.groups() == {"the activation is ReLU6": ["relu"]} and report.explained
    assert compared(jax.nn.relu6, F.relu6).verdict == "equal"
    assert compared(lambda x: jnp.clip(x, -8, 8), lambda x: x).verdict == "divergent"
    report = compared(lambda x: jnp.clip(x, -900, 900), lambda x: x.clamp(-900, 900))
    assert report.hidden == [
        f"{what} never reaches its bound of {bound}"
        for what in ("clamp", "JAX's network")
        for bound in (-900, 900)
    ]
    for one_sided in ((lambda x: x.clamp(min=-900)), (lambda x: x.clamp(max=900))):
        assert compared(lambda x: x, one_sided).verdict == "undecided"


def test_a_factor_may_stand_in_another_layer():
    def apply(variables, x, train):
        x = jax.nn.relu(x @ variables["first"])
        x = jnp.einsum("bhwc,kc->bk", x, variables["last"]) / (x.shape[1] * x.shape[2])
        return x + variables["bias"], variables

    shapes = {"first": (3, 6), "last": (4, 6), "bias": (4,)}
    first, head = nn.Conv2d(3, 6, 1, bias=False), nn.Linear(6, 4)
    net = Torch(lambda net, x: net.head(F.relu(net.first(x)).mean((2, 3))), first=first, head=head)
    port = apply, {name: jnp.zeros(shape) for name, shape in shapes.items()}
    report = compare_models(port, net, image_size=(5, 7))
    assert report.verdict == "equal" and report.largest < 1e-13, str(report)
    assert report.notes[0].startswith("the results agree, though activations differ at")


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return -gradient


def unseen(x):
    with torch.no_grad():
        return 2 * x


@pytest.mark.control
@pytest.mark.parametrize("function", [Reversed.apply, unseen])
def test_gradients_that_the_graph_has_not_are_refused(function):
    port = activated(lambda x: 2 * x if function is unseen else x)
    with pytest.raises(InputError, match="is not that of its operations"):
        compare_models(port, activated_in_torch(function), image_size=(5, 7))


@pytest.mark.control
def test_a_gradient_of_zero_with_the_rounding_of_float32_is_none():
    """A softmax does not depend on the bias of attention's keys."""

    def body(net, x):
        x = net.first(x).flatten(2).mT
        scores = net.query(x) @ net.key(x).mT
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        return net.head((weights @ x).mean(1))

    layers = {name: nn.Linear(6, 6) for name in ("query", "key")}
    net = Torch(body, first=nn.Conv2d(3, 6, 1), head=nn.Linear(6, 4), **layers)
    exported.graph(net.double(), (5, 3, 4, 5), train=False)


def gated(eps, pooled, scale):
    """Attention over channels by a convolution of one axis, and a branch times a number."""

    def body(x, train):
        x = linen.InstanceNorm(epsilon=eps)(conv(x))
        gate = linen.Conv(1, (3,), padding=1, use_bias=False)(x.max((1, 2))[:, :, None])
        x = linen.max_pool(x, (3, 3), (2, 2), [(0, pooled)] * 2)
        x = conv(x) * jax.nn.hard_sigmoid(gate.swapaxes(1, 2)[:, None])
        return linen.Dense(4)((x + scale * jnp.sin(x)).mean((1, 2)))

    return Linen(body)


@pytest.mark.control
def test_layers_between_layers_are_followed():
    def body(net, x):
        x = net.norm(net.conv(x))
        gate = net.gate(x.amax((2, 3))[:, None]).squeeze(1)[:, :, None, None]
        x = net.wide(F.max_pool2d(x, 3, 2, ceil_mode=True)) * F.hardsigmoid(gate)
        return net.head((x + 0.2 * torch.sin(x)).mean((2, 3)))

    net = Torch(
        body, conv=nn.Conv2d(3, 6, 3, padding=1), norm=nn.InstanceNorm2d(6, affine=True),
        gate=nn.Conv1d(1, 1, 3, padding=1, bias=False), wide=nn.Conv2d(6, 6, 3, padding=1),
        head=nn.Linear(6, 4),
    )  # fmt: skip
    report = compare_models(gated(1e-5, 1, 0.2), net, image_size=(6, 8))
    assert not report.faults and report.largest < 1e-13, str(report)
    report = compare_models(gated(1e-3, 0, 0.3), net, image_size=(6, 8))
    assert report.groups() == {
        "eps is 0.001 instead of 1e-05": ["norm"],
        "the max-pool rounds its size down (ceil_mode=False)": ["max_pool2d"],
        "the factor is 0.3 instead of 0.2": ["mul"],
    }


@Linen
def frozen_in_jax(x, train):
    """A batch norm that normalises by its running statistics in training, too."""
    x = linen.Conv(6, (3, 3), padding=1, use_bias=False)(x)
    x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
    return linen.Dense(4)(x.mean((1, 2)))


def test_batch_norms_without_a_running_average_are_followed():
    def frozen(net, x):
        norm = net.norm
        given = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return net.head(F.relu(F.batch_norm(net.conv(x), *given)).mean((2, 3)))

    layers = {"conv": nn.Conv2d(3, 6, 3, padding=1, bias=False), "head": nn.Linear(6, 4)}
    net = Torch(frozen, norm=nn.BatchNorm2d(6), **layers)
    assert compare_models(frozen_in_jax, net, image_size=(5, 7)).verdict == "equal"


def test_a_batch_norm_without_momentum_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), *pooled())
    with pytest.raises(InputError, match="the BatchNorm 1 has momentum=None"):
        compare_models(frozen_in_jax, net)


def test_an_adaptive_pool_is_asked_for_a_size_that_it_does_not_divide():
    def body(x, train):
        batch, height, width, channels = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2]
        x = x.reshape(batch, 2, height // 2, 2, width // 2, channels).mean((2, 4))
        return linen.Dense(4)(x.reshape(batch, -1))

    net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    report = compare_models(Linen(body), net, image_size=(8, 10))
    assert report.hidden == ["0 sees only even sizes (8 x 10)"]


@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.control)])
def test_a_kernel_with_a_norm_of_its_own(axis):
    def apply(variables, x, train):
        kernel = variables["kernel"] / jnp.linalg.norm(
            variables["kernel"], axis=axis, keepdims=True
        )
        logits = x.mean((1, 2)) @ (kernel * variables["norm"]) + variables["bias"]
        return logits, variables

    variables = {"kernel": jnp.ones((3, 4)), "norm": jnp.ones(4), "bias": jnp.ones(4)}
    head = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    report = compare_models(
        (apply, variables), Torch(lambda net, x: net.head(x.mean((2, 3))), head=head)
    )
    assert report.verdict == ("divergent" if axis else "equal"), str(report)


def test_a_convolution_that_cannot_be_placed_is_no_difference():
    def apply(variables, x, train):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1:3]
        y = sum(
            padded[:, i : i + height, j : j + width] @ variables["kernel"][i, j]
            for i in range(3) for j in range(3)
        )  # fmt: skip
        return jax.nn.relu(y).mean((1, 2)) @ variables["head"], variables

    variables = {"kernel": jnp.zeros((3, 3, 3, 6)), "head": jnp.zeros((6, 4))}
    net = Torch(
        lambda net, x: net.head(F.relu(net.conv(x)).mean((2, 3))),
        conv=nn.Conv2d(3, 6, 3, padding=1, bias=False), head=nn.Linear(6, 4, bias=False),
    )  # fmt: skip
    report = compare_models((apply, variables), net, image_size=(9, 12))
    unknown = "undecided: conv.weight has no place in JAX, JAX's ['kernel'] has no place in PyTorch"
    assert report.sentence() == unknown and not report.faults


@pytest.mark.control
def test_a_resize_that_smooths_first_is_named():
    def body(x, train):
        x = jax.image.resize(linen.relu(conv(x)), (len(x), 4, 6, 6), "bilinear")
        return linen.Dense(4)(x.max((1, 2)))

    net = Torch(
        lambda net, x: net.head(
            F.interpolate(F.relu(net.conv(x)), (4, 6), mode="bilinear").amax((2, 3))
        ),
        conv=nn.Conv2d(3, 6, 3, padding=1), head=nn.Linear(6, 4),
    )  # fmt: skip
    report = compare_models(Linen(body), net, image_size=(9, 12))
    assert list(report.groups()) == ["the resize is bilinear with antialias=True"]
