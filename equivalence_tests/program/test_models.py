"""Networks: names, options, sizes, initial values, dtypes."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from flax import nnx

import flax_resnet
import torch_ref
from flax_resnet.config import WITH_STEMS, ModelConfig
from flax_resnet.errors import InputError
from flax_resnet.models import layers, resnet, summary
from flax_resnet.training.network import Network

TORCHVISION = list(WITH_STEMS)
HE = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


def abstract(*args, **kwargs):
    """A model with shapes but no values."""
    return nnx.eval_shape(lambda: flax_resnet.create_model(*args, **kwargs, rngs=nnx.Rngs(0)))


def num_parameters(model):
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_there_are_sixteen_names():
    assert len(flax_resnet.list_models()) == 16
    assert set(TORCHVISION) <= set(torchvision.models.list_models())


@pytest.mark.parametrize("arch", TORCHVISION)
def test_parameter_counts_are_torchvisions(arch):
    with torch.device("meta"):
        twin = torchvision.models.get_model(arch, weights=None)
    assert num_parameters(abstract(arch, 1000)) == sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize("arch", HE)
def test_parameter_counts_are_those_of_the_paper(arch):
    # Table 6 counts to two digits.
    assert num_parameters(abstract(arch, 10)) / 1e6 == pytest.approx(HE[arch], rel=0.03)


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d", "resnet110", "basic_cnn"])
def test_options_reach_every_network(arch):
    model = abstract(arch, 7, in_channels=1)
    images = jax.ShapeDtypeStruct((2, 33, 40, 1), jnp.float32)
    assert nnx.eval_shape(lambda m, x: m(x), model, images).shape == (2, 7)
    assert model.conv1.kernel.shape[2] == 1


@pytest.mark.parametrize("arch", ["resnet18", "wide_resnet50_2"])
def test_the_cifar_stem_keeps_the_pixels(arch):
    assert abstract(arch, stem="cifar").conv1.kernel.shape[:2] == (3, 3)
    assert abstract(arch).conv1.kernel.shape[:2] == (7, 7)


def test_the_basic_cnn_refuses_images_of_which_nothing_is_left():
    model = abstract("basic_cnn")
    for size, refused in (((8, 8), False), ((7, 8), True), ((8, 7), True)):
        images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        with (
            pytest.raises(InputError, match="x".join(map(str, size))) if refused else nullcontext()
        ):
            nnx.eval_shape(lambda m, x: m(x), model, images)


def test_the_summary_counts_what_the_literature_counts():
    """ResNet-18 at 224 pixels: 1.814 GMAC, map sizes of table 1; the small stem keeps 32."""
    model = flax_resnet.create_model("resnet18", 1000)
    rows = summary.stage_rows(model, (224, 224, 3))
    assert sum(row["flops"] for row in rows) / 2e9 == pytest.approx(1.814, rel=1e-3)
    assert sum(row["parameters"] for row in rows) == num_parameters(model)
    sizes = {row["name"]: row["output"][0] for row in rows}
    assert [sizes[f"layer{i}"] for i in (1, 2, 3, 4)] == [56, 28, 14, 7]
    rows = summary.stage_rows(flax_resnet.create_model("resnet20"), (32, 32, 3))
    assert {row["name"]: row["output"][0] for row in rows}["layer1"] == 32


@pytest.mark.parametrize("arch", [*HE, "basic_cnn"])
def test_networks_with_their_own_stem_refuse_another(arch):
    with pytest.raises(InputError, match="own stem"):
        flax_resnet.create_model(arch, stem="cifar")


@pytest.mark.parametrize("arch", [*TORCHVISION, "basic_cnn"])
def test_networks_with_their_own_shortcut_refuse_another(arch):
    with pytest.raises(InputError, match="own shortcut"):
        flax_resnet.create_model(arch, shortcut="projection")
    with pytest.raises(ValueError, match="own shortcut"):
        torch_ref.create_model(arch, shortcut="projection")
    with pytest.raises(ValueError, match="shortcut"):
        ModelConfig(arch=arch, shortcut="pad")


QUICK = ("resnet18", "resnet50", "resnext50_32x4d", "resnet20", "basic_cnn")


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=() if arch in QUICK else pytest.mark.slow)
        for arch in flax_resnet.list_models()
    ],
)
def test_flax_can_tabulate_every_network(arch):
    tables = []

    def tabulate():  # traced, which takes a tenth of the time of a call
        images = jnp.zeros((2, 32, 32, 3))
        tables.append(nnx.tabulate(flax_resnet.create_model(arch), images))

    jax.eval_shape(tabulate)
    assert "Total Parameters" in tables[0]


def test_bad_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="resnet19.*did you mean 'resnet1"):
        flax_resnet.create_model("resnet19")
    with pytest.raises(InputError, match="did you mean 'imagenet'"):
        flax_resnet.create_model("resnet18", stem="imagnet")
    with pytest.raises(InputError, match="did you mean 'projection'"):
        flax_resnet.create_model("resnet20", shortcut="projections")
    with pytest.raises(InputError, match="unknown `kernels` 'librery'; did you mean 'library'"):
        flax_resnet.create_model("resnet20", kernels="librery")
    with pytest.raises(InputError, match="zero_init_residual"):
        flax_resnet.create_model("basic_cnn", zero_init_residual=True)
    with pytest.raises(InputError, match="`remat`: basic_cnn has no residual blocks"):
        flax_resnet.create_model("basic_cnn", remat=True)
    with pytest.raises(InputError, match="dropout"):
        flax_resnet.create_model("resnet18", dropout=1.0)


@pytest.mark.parametrize("changes", [
    {"in_channels": 0}, {"in_channels": 2.0}, {"num_classes": "3"}, {"num_classes": 0},
    {"num_classes": True}, {"num_classes": None}, {"num_classes": 10**10}, {"dropout": "0.5"},
    {"dropout": float("nan")}, {"dtype": "float7"}, {"dtype": "int8"}, {"param_dtype": "int32"},
], ids=str)  # fmt: skip
def test_options_of_another_kind_are_refused(changes):
    [(name, value)] = changes.items()
    with pytest.raises(InputError, match=f"^`{name}` .*{value!r}"):
        flax_resnet.create_model("resnet20", **changes)


def test_numbers_of_numpy_are_numbers():
    model = abstract("resnet20", np.int64(3), in_channels=np.int32(1), dtype="bfloat16")
    assert model.fc.kernel.shape == (64, 3)


@pytest.mark.parametrize("arch", ["resnet20", "basic_cnn"])
def test_no_image_has_no_logits(arch):
    model = flax_resnet.create_model(arch)
    model.eval()
    assert jax.eval_shape(model, jnp.zeros((0, 8, 8, 3))).shape == (0, 10)


def test_zero_init_residual_starts_blocks_as_identities():
    model = flax_resnet.create_model("resnet20", zero_init_residual=True)
    assert all((block.bn2.scale[...] == 0).all() for block in model.blocks())
    assert all((block.bn1.scale[...] == 1).all() for block in model.blocks())
    plain = flax_resnet.create_model("resnet20")
    assert all((block.bn2.scale[...] == 1).all() for block in plain.blocks())


def one_step(remat: bool) -> tuple:
    """Gradients and statistics of a training step in float64."""
    small = partial(resnet.ResNet, resnet.BasicBlock, (1,), planes=4)
    network = Network(small(remat=remat, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    images = jax.random.normal(jax.random.key(1), (4, 9, 12, 3), jnp.float64)

    @partial(jax.grad, has_aux=True)
    def step(params):
        variables = network.initial._replace(params=params)
        logits, stats = network.apply(variables, images, train=True)
        return jnp.square(logits).sum(), stats

    return jax.jit(step)(network.initial.params)


def differences(one, other) -> list[float]:
    relative = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), one, other)
    return jax.tree.leaves(relative)


def test_blocks_that_are_computed_again_change_no_result(monkeypatch):
    with jax.enable_x64(True):
        plain = one_step(remat=False)
        assert max(differences(plain, one_step(remat=True))) < 1e-13
        forgetful = lambda call: lambda block, *args: call(nnx.clone(block), *args)  # noqa: E731
        monkeypatch.setattr(nnx, "remat", forgetful)
        gradients, statistics = map(differences, plain, one_step(remat=True))
    # The control: blocks of which a copy is run keep their old statistics.
    assert max(gradients) < 1e-13 and max(statistics) > 0.1


@pytest.mark.parametrize("arch", ["resnet20", "basic_cnn"])
def test_bfloat16_computes_narrow_and_keeps_wide(arch):
    model = flax_resnet.create_model(arch, dtype=jnp.bfloat16)
    assert model(jnp.ones((2, 16, 16, 3))).dtype == jnp.bfloat16
    kept = jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype("float32"), jnp.dtype("int32")}


def test_a_model_is_made_in_training_mode_and_says_how_to_leave_it():
    """Training mode is torch's default too; the message names `model.eval()`, not a flag."""
    model, image = flax_resnet.create_model("resnet20"), jnp.zeros((1, 1, 1, 3))
    with pytest.raises(InputError, match=r"more than one value .* model.eval\(\)") as error:
        jax.eval_shape(lambda: model(image))
    assert "--" not in str(error.value)
    model.eval()
    assert jax.eval_shape(model, image).shape == (1, 10)


def test_train_and_eval_switch_statistics_and_dropout():
    model = flax_resnet.create_model("resnet20", dropout=0.5)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    before = np.asarray(model.bn1.mean[...])
    model.eval()
    first, second = model(images), model(images)
    assert (first == second).all() and (model.bn1.mean[...] == before).all()
    assert model.bn1.num_batches_tracked[...] == 0
    model.train()
    assert not (model(images) == model(images)).all()
    assert not (model.bn1.mean[...] == before).all()
    assert model.bn1.num_batches_tracked[...] == 2


def test_dropout_belongs_to_the_example():
    dropout = layers.Dropout(0.5, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 64))
    whole = dropout(x, keys)
    halves = jnp.concatenate([dropout(x[:3], keys[:3]), dropout(x[3:], keys[3:])])
    assert (whole == halves).all()
    assert set(np.unique(whole)) == {0.0, 2.0}
    assert len({row.tobytes() for row in np.asarray(whole)}) == 6
