"""Single layers, for differences that whole networks cannot show.

For example, the padding value of a max-pool after a ReLU, or a batch with one value per channel.
"""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from scipy import stats
from torch import nn

import flax_resnet
import torch_ref
import torch_ref.losses
import torch_ref.resnet
from equivalence_tests.parity import inputs, tolerances
from flax_resnet.errors import InputError
from flax_resnet.models import layers, resnet
from flax_resnet.models.summary import recorded_activations
from flax_resnet.training import losses
from torch_ref import checkpoint
from torch_ref.grouped_norm import GroupedBatchNorm2d

pytestmark = pytest.mark.quick


def random_images(*shape):
    """The same images as [B, H, W, C] for JAX and [B, C, H, W] for torch."""
    images = inputs.random_numbers().standard_normal(shape)
    return jnp.asarray(images), torch.tensor(images.transpose(0, 3, 1, 2))


def assert_equal(got, expected):
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerances.FORWARD * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (9, 12)])
@pytest.mark.parametrize("window, stride, padding", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
def test_max_pool_of_negative_numbers(size, window, stride, padding, x64):
    x, x_torch = random_images(2, *size, 3)
    expected = nn.MaxPool2d(window, stride, padding)(-x_torch.abs())
    assert_equal(layers.max_pool(-jnp.abs(x), window, stride, padding=padding), expected)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (16, 12), (3, 20)])
def test_adaptive_average_pool(size, x64):
    x, x_torch = random_images(2, *size, 3)
    assert_equal(layers.adaptive_average_pool(x, 8), nn.AdaptiveAvgPool2d(8)(x_torch))


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (9, 12), (2, 3)])
@pytest.mark.parametrize("kernel, stride, groups", [(3, 1, 1), (3, 2, 4), (1, 2, 1), (7, 2, 1)])
def test_convolution(size, kernel, stride, groups, x64):
    x, x_torch = random_images(2, *size, 8)
    theirs = nn.Conv2d(
        8, 12, kernel, stride, kernel // 2, groups=groups, bias=False, dtype=torch.float64
    )
    ours = layers.conv(
        8, 12, kernel, stride=stride, padding=kernel // 2, groups=groups,
        param_dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip
    ours.kernel[...] = jnp.asarray(theirs.weight.detach().numpy().transpose(2, 3, 1, 0))
    assert_equal(ours(x), theirs(x_torch))


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (2, 4)])
def test_bottleneck(stride, groups, x64):
    """The stride is in the 3x3 convolution; groups are contiguous."""
    x, x_torch = random_images(2, 7, 10, 16)
    torch.manual_seed(0)
    theirs = torch_ref.resnet.Bottleneck(
        16, 8, stride, torch_ref.resnet.projection, groups=groups
    ).double()
    options = dict(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    parts = dict(conv=partial(layers.conv, **options), norm=partial(layers.BatchNorm, **options))
    shortcut = partial(resnet._shortcut, projection=True, **parts)
    ours = resnet.Bottleneck(16, 8, stride, shortcut, groups=groups, base_width=64, **parts)
    flax_resnet.load_state_dict(ours, checkpoint.to_arrays(theirs.state_dict()))
    assert_equal(ours(x), theirs(x_torch))
    np.testing.assert_array_equal(ours.bn1.num_batches_tracked[...], theirs.bn1.num_batches_tracked)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1))
    norm = layers.BatchNorm(3)
    with pytest.raises(ValueError, match="more than one value"):
        norm(jnp.ones((1, 1, 1, 3)))
    norm.use_running_average = True
    assert norm(jnp.ones((1, 1, 1, 3))).shape == (1, 1, 1, 3)


@pytest.mark.parametrize("mean, first, most", [(0, 0, 2), (1e4, 0, 2), (0, 1e3, 2 * 64)])
def test_the_variance_keeps_its_digits_whatever_the_mean(mean, first, most):
    """Even a first image far from the others costs no more than B times the rounding."""
    numbers = np.random.default_rng(0).standard_normal((64, 14, 14, 16)) + mean
    numbers[0] += first
    x = numbers.astype(np.float32)
    _, var, _ = layers.BatchNorm(16)._batch_statistics(jnp.asarray(x))
    rounding = 1e-6  # of a sum of 12,544 squares
    expected = x.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(var, expected, rtol=most * rounding)


def test_batch_norm_of_a_batch_on_two_devices(x64):
    """Mean, variance and n are those of the whole batch on all devices."""
    x, x_torch = random_images(4, 2, 3, 5)
    theirs = nn.BatchNorm2d(5, dtype=torch.float64)
    expected = theirs(x_torch)

    @partial(jax.vmap, axis_name="data", out_axes=(0, None))
    def ours(x):
        norm = layers.BatchNorm(5, axis_name="data", param_dtype=jnp.float64)
        return norm(x), (norm.mean[...], norm.var[...], norm.num_batches_tracked[...])

    got, (mean, var, count) = ours(x.reshape(2, 2, *x.shape[1:]))
    assert_equal(got.reshape(x.shape), expected)
    np.testing.assert_allclose(mean, theirs.running_mean, rtol=tolerances.FORWARD)
    np.testing.assert_allclose(var, theirs.running_var, rtol=tolerances.FORWARD)
    assert int(count) == int(theirs.num_batches_tracked) == 1


@pytest.mark.parametrize("kernels", ["auto", "library"])
@pytest.mark.parametrize("devices, group_size", [(1, 4), (2, 2), (2, 4), (4, 4), (4, 8)])
def test_batch_norm_of_groups_of_images(devices, group_size, kernels, x64):
    """A device has several groups, one, or a part of one."""
    x, x_torch = random_images(8, 2, 3, 5)
    rising = np.arange(8.0).reshape(-1, 1, 1, 1)
    x, x_torch = x + rising, (x_torch + torch.tensor(rising)).requires_grad_()
    theirs = GroupedBatchNorm2d(5, group_size).double()

    def ours(x):
        norm = layers.BatchNorm(
            5, axis_name="data", group_size=group_size, param_dtype=jnp.float64, kernels=kernels
        )
        return norm(x), lax.pmean((norm.mean[...], norm.var[...]), "data")

    mesh, rows = jax.sharding.Mesh(jax.devices()[:devices], ("data",)), jax.P("data")
    shared = jax.shard_map(
        ours, mesh=mesh, in_specs=rows, out_specs=(rows, jax.P()), check_vma=False
    )
    got, gradient_of, (mean, var) = jax.vjp(jax.jit(shared), x, has_aux=True)
    expected, weights = theirs(x_torch), np.sin(np.arange(x.size)).reshape(x.shape)
    expected.backward(torch.tensor(weights.transpose(0, 3, 1, 2)))
    assert_equal(got, expected)
    assert_equal(gradient_of(jnp.asarray(weights))[0], x_torch.grad)
    np.testing.assert_allclose(mean, theirs.running_mean, rtol=tolerances.FORWARD)
    np.testing.assert_allclose(var, theirs.running_var, rtol=tolerances.FORWARD)


def test_groups_that_devices_or_images_cannot_form_are_refused():
    norm = layers.BatchNorm(3, group_size=3)
    with pytest.raises(InputError, match="4 images cannot be divided into groups of 3"):
        norm(jnp.ones((4, 2, 2, 3)))
    norm = layers.BatchNorm(3, axis_name="data", group_size=3)
    with pytest.raises(InputError, match="2 devices with 2 images each cannot share groups of 3"):
        jax.vmap(norm, axis_name="data")(jnp.ones((2, 2, 2, 2, 3)))


MANY = 200_000


def fresh_weights(framework, arch, seed) -> dict:
    if framework == "torch":
        torch.manual_seed(seed)
        model = torch_ref.create_model(arch, num_classes=1000)
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    model = flax_resnet.create_model(arch, num_classes=1000, rngs=nnx.Rngs(seed))
    return flax_resnet.state_dict(model)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "basic_cnn"])
def test_fresh_weights_are_drawn_as_torchs(arch):
    """In every layer constants are equal, and other values pass a Kolmogorov-Smirnov test.

    Each has at least a few hundred values, so a bias of zeros would be detected.
    """
    times = 10 if arch == "basic_cnn" else 1
    ours, twins = (
        [fresh_weights(framework, arch, seed) for seed in range(times)]
        for framework in ("jax", "torch")
    )
    for name in twins[0]:
        got, expected = (
            np.concatenate([weights[name].ravel() for weights in draws]) for draws in (ours, twins)
        )
        if np.ptp(expected) == 0:
            np.testing.assert_array_equal(got, expected, err_msg=name)
        else:
            assert stats.ks_2samp(got[:MANY], expected[:MANY]).pvalue > 1e-6, name


def types_in_jax(arch):
    """{activation: its dtype in mixed precision}."""

    def run(images):
        model = flax_resnet.create_model(arch, dtype=jnp.bfloat16)
        with recorded_activations(model) as outputs:
            model(images)
        return {name: output for name, output in outputs.items() if name}

    shapes = jax.eval_shape(run, jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32))
    return {name: str(leaf.dtype) for name, leaf in shapes.items()}


def types_in_torch(arch):
    seen, model = {}, torch_ref.create_model(arch)
    for name, module in model.named_modules():
        keep = lambda m, i, out, name=name: seen.update({name: str(out.dtype)[6:]})  # noqa: E731
        module.register_forward_hook(keep)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(4, 3, 32, 32))
    return seen


@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "basic_cnn"])
def test_types_in_mixed_precision(arch):
    """Each activation has the dtype that it has in torch's autocast."""
    got, expected = types_in_jax(arch), types_in_torch(arch)
    assert set(got.values()) == {"bfloat16"}
    assert got == {name: expected[name] for name in got}


def test_statistics_are_wide_in_mixed_precision():
    """After several layers the ulp of bfloat16 would hide narrow statistics."""
    images, tensor = (x + 1 for x in random_images(8, 6, 6, 4))
    ours, theirs = layers.BatchNorm(4, dtype=jnp.bfloat16), nn.BatchNorm2d(4)
    got, expected = ours(images.astype(jnp.bfloat16)), theirs(tensor.bfloat16())
    assert got.dtype == "bfloat16" and expected.dtype == torch.bfloat16
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-6)
    np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-6)


def test_the_loss_is_wide_in_mixed_precision():
    logits = jnp.asarray([[1.0, 2.0, 3.001]], jnp.bfloat16)
    targets = losses.soft_targets(jnp.array([2]), 3, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch_ref.losses.cross_entropy(
            torch.tensor(np.asarray(logits, np.float32)).bfloat16(), torch.tensor([2]),
            label_smoothing=0.1,
        )  # fmt: skip
    got = losses.cross_entropy(logits, targets)
    assert got.dtype == "float32" and expected.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_targets_of_mixup_are_wide_in_mixed_precision():
    logits, targets = [[1.0, 2.0, 3.0]], np.float32([[0.1, 0.2, 0.7]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch_ref.losses.cross_entropy(
            torch.tensor(logits).bfloat16(), torch.from_numpy(targets)
        )
    got = losses.cross_entropy(jnp.asarray(logits, jnp.bfloat16), targets)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_stochastic_depth_is_torchvisions_in_every_block(x64):
    """The twin gives the same logits for equal draws, and timm has the same chances."""
    masks, drawn = inputs.random_numbers().random((9, 6)) < 0.5, []
    theirs = torch_ref.create_model("resnet20", 4, stochastic_depth=0.6).double().train()
    network = flax_resnet.create_model(
        "resnet20", 4, stochastic_depth=0.6, param_dtype=jnp.float64, dtype=jnp.float64
    )
    flax_resnet.load_state_dict(network, {k: v.numpy() for k, v in theirs.state_dict().items()})
    images = inputs.random_numbers(1).standard_normal((6, 3, 8, 8))

    def ours(keys, probability, shape):
        drawn.append(probability)
        return jnp.asarray(masks[len(drawn)]).reshape(-1, *shape)

    def bernoulli(self, probability):
        return self.copy_(torch.tensor(masks[calls.pop(0)]).reshape(self.shape))

    with mock.patch.object(layers, "keep_mask", ours):
        keys = jax.random.split(jax.random.key(0), 6)
        got = network(jnp.asarray(images.transpose(0, 2, 3, 1)), dropout_keys=keys)
    calls = list(range(1, 9))
    with mock.patch.object(torch.Tensor, "bernoulli_", bernoulli):
        expected = theirs(torch.tensor(images)).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(drawn, 1 - 0.6 * np.arange(1, 9) / 8)
    network.eval()
    expected = theirs.eval()(torch.tensor(images)).detach().numpy()
    np.testing.assert_allclose(
        network(jnp.asarray(images.transpose(0, 2, 3, 1))), expected, rtol=1e-11, atol=1e-11
    )


def test_stochastic_depth_has_timms_chances():
    timm = pytest.importorskip("timm")
    reference = timm.create_model("resnet18", drop_path_rate=0.3)
    paths = [
        block.drop_path for stage in range(1, 5) for block in getattr(reference, f"layer{stage}")
    ]
    network = flax_resnet.create_model("resnet18", stochastic_depth=0.3)
    ours = [getattr(block.stochastic_depth, "rate", 0.0) for block in network.blocks()]
    assert ours == pytest.approx([getattr(path, "drop_prob", 0.0) for path in paths])


def test_stochastic_depth_draws_for_each_image():
    layer = layers.StochasticDepth(0.3, rngs=nnx.Rngs(0))
    got = np.asarray(layer(jnp.ones((4000, 2, 3, 5)), jax.random.split(jax.random.key(0), 4000)))
    assert (got == got[:, :1, :1, :1]).all() and abs((got == 0).mean() - 0.3) < 0.03
    np.testing.assert_allclose(got.max(), 1 / 0.7, rtol=1e-6)


def test_dropout_drops_its_rate_and_keeps_the_mean():
    """Networks are compared with one mask, and at a rate of 0.5 keeping and dropping look alike."""
    shape, rate = (64, 256), 0.3
    torch.manual_seed(0)
    dropout = layers.Dropout(rate, rngs=nnx.Rngs(0))
    got = np.asarray(dropout(jnp.ones(shape), jax.random.split(jax.random.key(0), shape[0])))
    expected = nn.Dropout(rate)(torch.ones(shape)).numpy()
    five_deviations = 5 * np.sqrt(2 * rate * (1 - rate) / got.size)
    assert abs((got == 0).mean() - (expected == 0).mean()) < five_deviations
    np.testing.assert_allclose(got.max(), expected.max(), rtol=1e-6)
