"""The twin's nets are torchvision's and He et al.'s: same keys, same numbers, same start."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torch_ref
from flax_resnet.config import EarlyStoppingConfig, OptimizerConfig, ScheduleConfig
from flax_resnet.errors import InputError
from torch_ref import checkpoint, losses, optim, selection

TORCHVISION = torch_ref.list_models()[:10]
CIFAR = torch_ref.list_models()[10:15]
CHECKPOINTS = Path(__file__).parents[2].parent / "shared/data/checkpoints"


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of the size that keeps activations near 1; every BatchNorm distinct."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            fan_in = tensor[0].numel()
            tensor.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            tensor.random_(1, 100, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.3, generator=generator)
    return model


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Torchvision's net and ours with the same random state."""
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=7)
        ours = torch_ref.create_model(name, num_classes=7)
    theirs = randomised(theirs.to_empty(device="cpu"))
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def one_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, every gradient and the state after one forward in train mode."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 40, 48, generator=generator, requires_grad=True)
    logits = model.train()(images)
    nn.functional.cross_entropy(logits, torch.tensor([2, 5])).backward()
    gradients = {f"gradient of {k}": p.grad for k, p in model.named_parameters()}
    return {"logits": logits, "images": images.grad, **gradients, **model.state_dict()}


def differences(theirs: nn.Module, ours: nn.Module) -> list[str]:
    expected, got = one_step(theirs), one_step(ours)
    assert list(expected) == list(got)
    assert all(torch.isfinite(value).all() for value in expected.values())
    return [name for name in expected if not torch.equal(expected[name], got[name])]


@pytest.mark.parametrize("name", TORCHVISION)
def test_same_keys_order_and_shapes_as_torchvision(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=7).state_dict()
        for stem, first in (("imagenet", (64, 3, 7, 7)), ("cifar", (64, 3, 3, 3))):
            ours = torch_ref.create_model(name, 7, stem=stem, dropout=0.5).state_dict()
            assert list(ours) == list(theirs)
            shapes = {k: tuple(v.shape) for k, v in theirs.items()} | {"conv1.weight": first}
            assert {k: tuple(v.shape) for k, v in ours.items()} == shapes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if re.search("18|50_", name) else pytest.mark.slow)
        for name in TORCHVISION
    ],
)
def test_bit_for_bit_equal_to_torchvision(name):
    assert differences(*pair(name)) == []


def stride_on_the_first_convolution(model):
    model.layer2[0].conv1.stride, model.layer2[0].conv2.stride = (2, 2), (1, 1)


def double_epsilon(model):
    model.layer3[0].bn1.eps = 2e-5


def momentum_of_flax(model):
    model.bn1.momentum = 0.01


def pool_off_by_one(model):
    model.maxpool = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))


@pytest.mark.parametrize(
    "fault", [stride_on_the_first_convolution, double_epsilon, momentum_of_flax, pool_off_by_one]
)
def test_the_comparison_sees_a_fault(fault):
    theirs, ours = pair("resnet50")
    fault(ours)
    assert differences(theirs, ours) != []


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("zero_init_residual", [False, True])
def test_same_seed_gives_torchvisions_initial_weights(name, zero_init_residual):
    torch.manual_seed(3)
    options = {"num_classes": 7, "zero_init_residual": zero_init_residual}
    theirs = getattr(torchvision.models, name)(**options)
    torch.manual_seed(3)
    ours = torch_ref.create_model(name, **options)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    "name, millions", list(zip(CIFAR, [0.27, 0.46, 0.66, 0.85, 1.7], strict=True))
)
def test_parameter_counts_of_the_paper(name, millions):
    """Table 6 of arXiv:1512.03385, which gives two digits."""
    count = sum(p.numel() for p in torch_ref.create_model(name).parameters())
    assert float(f"{count / 1e6:.2g}") == millions


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_keys_and_shapes_of_public_cifar_checkpoints(name):
    found = sorted(CHECKPOINTS.glob(f"{name}-*.th"))
    if not found:
        pytest.skip(f"no {name} checkpoint beside the repository")
    arrays = {
        key.removeprefix("module.").replace("linear.", "fc."): value.shape
        for key, value in checkpoint.load(found[0]).items()
    }
    state = torch_ref.create_model(name).state_dict()
    # The checkpoints are older than num_batches_tracked.
    ours = {k: tuple(v.shape) for k, v in state.items() if not k.endswith("_tracked")}
    assert ours == arrays


def test_padded_shortcut():
    block = torch_ref.create_model("resnet20").layer2[0]
    x = torch.randn(2, 16, 9, 12)
    out = block.downsample(x)
    assert out.shape == (2, 32, 5, 6)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()
    assert torch.equal(torch_ref.create_model("resnet20").layer1[0].downsample(x), x)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "basic_cnn"])
def test_dropout_sits_before_the_last_linear_layer(name):
    model = torch_ref.create_model(name, num_classes=7, dropout=0.5)
    assert list(model.state_dict()) == list(torch_ref.create_model(name, 7).state_dict())
    seen = {}
    model.dropout.register_forward_hook(lambda _, x, y: seen.update(before=x[0], after=y))
    model.fc.register_forward_hook(lambda _, x, y: seen.update(fc=x[0]))
    images = torch.randn(4, 3, 33, 40)
    model.train()(images)
    assert seen["fc"] is seen["after"]
    kept = seen["after"] != 0
    assert torch.equal(seen["after"][kept], seen["before"][kept] * 2)
    assert seen["before"][~kept].any()
    model.eval()(images)
    assert torch.equal(seen["after"], seen["before"])


@pytest.mark.parametrize("size", [(8, 8), (33, 40), (64, 64)])
def test_basic_cnn_takes_any_image_from_8_pixels(size):
    model = torch_ref.create_model("basic_cnn", num_classes=7, in_channels=1)
    assert model(torch.randn(2, 1, *size)).shape == (2, 7)
    with pytest.raises(ValueError, match="8 x 8"):
        model(torch.randn(2, 1, 7, 12))


@pytest.mark.parametrize(
    "name, stem, word",
    [
        ("resnet81", None, "resnet18"),
        ("resnet20", "cifar", "stem"),
        ("basic_cnn", "imagenet", "stem"),
        ("resnet18", "cifra", "cifra"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_it(name, stem, word):
    with pytest.raises(ValueError, match=word):
        torch_ref.create_model(name, stem=stem)


def test_losses_follow_their_definitions():
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    soft = 0.9 * nn.functional.one_hot(labels, 4).double() + 0.1 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.cross_entropy(logits, labels, label_smoothing=0.1), expected)
    torch.testing.assert_close(losses.cross_entropy(logits, soft), expected)
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])]
    assert losses.l1_penalty(weights, 0.5) == 3.0


def steps(rule: dict, num_steps: int = 4) -> torch.Tensor:
    """A weight and a bias after some steps on a fixed quadratic."""
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) - 2)
        model.bias.copy_(torch.tensor([0.7, -0.4]))
    optimizer = optim.make_optimizer(model, OptimizerConfig(lr=0.03, **rule))
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.tensor([[0.3, -1.0, 2.0]]).double()).square().sum().backward()
        optimizer.step()
    return torch.cat([model.weight.detach().flatten(), model.bias.detach()])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_weight_decay_is_coupled_decoupled_or_spared(name):
    decay = {"optimizer": name, "weight_decay": 0.2}
    plain = steps(decay | {"weight_decay": 0.0})
    variants = [steps(decay), steps(decay | {"decay_norm_and_bias": False})]
    decoupled = steps(decay | {"decoupled_weight_decay": True})
    assert not torch.equal(variants[0], plain)
    assert not torch.equal(variants[1], variants[0])
    assert torch.equal(decoupled, variants[0]) == (name == "adamw")
    # One step: decoupled decay is the plain step from weights that shrank by lr * weight_decay.
    first = steps(decay | {"decoupled_weight_decay": True}, 1) - steps(
        decay | {"weight_decay": 0.0}, 1
    )
    start = torch.tensor([-2.0, -1, 0, 1, 2, 3, 0.7, -0.4]).double()
    torch.testing.assert_close(first, -0.03 * 0.2 * start, rtol=1e-7, atol=1e-12)


def test_decoupled_adam_is_adamw():
    adam = {"optimizer": "adam", "decoupled_weight_decay": True}
    assert torch.equal(steps(adam), steps({"optimizer": "adamw"}))


def rates(num_steps: int = 40, **schedule) -> np.ndarray:
    """Learning rate of each update, in an optimizer that starts at 0.4."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4, momentum=0.9)
    scheduler, plateau = optim.make_schedulers(optimizer, ScheduleConfig(**schedule), 10, 4)
    assert (plateau is None) == (schedule["schedule"] != "plateau")
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(seen)


WARMUP = {"warmup_epochs": 0.5, "warmup_factor": 0.2}
RAMP = 0.4 * (0.2 + 0.8 * np.arange(5) / 5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ({"schedule": "constant"}, np.full(40, 0.4)),
        ({"schedule": "plateau"}, np.full(40, 0.4)),
        ({"schedule": "step", "step_epochs": 2}, 0.4 * 0.1 ** (np.arange(40) // 20)),
        (
            {"schedule": "multistep", "milestones": (1, 3), "gamma": 0.5},
            0.4 * 0.5 ** np.repeat([0, 1, 1, 2], 10),
        ),
        (
            {"schedule": "cosine", "min_lr": 0.1},
            0.1 + 0.15 * (1 + np.cos(np.pi * np.arange(40) / 40)),
        ),
    ],
)
def test_schedules_follow_their_formula(schedule, expected):
    np.testing.assert_allclose(rates(**schedule), expected, rtol=1e-12)
    warm = rates(**schedule, **WARMUP)
    np.testing.assert_allclose(warm[:5], RAMP, rtol=1e-12)
    if schedule["schedule"] != "cosine":  # which is as long as the epochs that are left
        np.testing.assert_allclose(warm[5:], expected[:35], rtol=1e-12)
    else:
        cosine = 0.1 + 0.15 * (1 + np.cos(np.pi * np.arange(35) / 35))
        np.testing.assert_allclose(warm[5:], cosine, rtol=1e-12)


def test_onecycle_rises_and_falls_within_the_run():
    seen = rates(schedule="onecycle")
    assert seen.argmax() == 0.3 * 40 - 1 and seen.max() == pytest.approx(0.4)
    assert seen[0] == pytest.approx(0.4 / 25) and seen[-1] == pytest.approx(0.4 / 25 / 1e4)
    warm = rates(schedule="onecycle", **WARMUP)
    assert warm[0] == pytest.approx(0.2 * 0.4 / 25) and warm[5] == pytest.approx(0.4 / 25)
    assert warm[14:16].max() == warm.max() == pytest.approx(0.4, rel=2e-3)  # peak between two steps


def test_a_onecycle_that_torch_cannot_divide_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    config = ScheduleConfig(schedule="onecycle", pct_start=0.1)
    with pytest.raises(InputError, match="pct_start"):
        optim.make_schedulers(optimizer, config, 10, 1)


def test_plateau_cuts_after_more_bad_epochs_than_its_patience():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    config = ScheduleConfig(schedule="plateau", plateau_patience=1, gamma=0.5)
    _, plateau = optim.make_schedulers(optimizer, config, 1, 9, "max")
    seen = []
    for value in [0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7]:
        plateau.step(value)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.1]


def test_moving_average_of_weights():
    model = nn.Linear(1, 1, bias=False)
    ema = optim.make_ema(model, 0.9)
    expected = None
    for value in [1.0, 2.0, 4.0]:
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert ema.module.weight.item() == pytest.approx(expected)


def test_early_stopping():
    config = EarlyStoppingConfig(monitor="validation_loss", patience=2, min_delta=0.1)
    state, stops = selection.Selection(), []
    for epoch, value in enumerate([float("nan"), 1.0, 0.95, 0.8, float("nan"), 0.75], start=1):
        state = selection.update(state, value, epoch, config)
        stops.append(state.should_stop(config.patience))
    assert (state.best, state.best_epoch, state.reference) == (0.75, 6, 0.8)
    assert stops == [False, False, False, False, False, True]


def test_weights_files_round_trip(tmp_path):
    state = torch_ref.create_model("resnet20").to(memory_format=torch.channels_last).state_dict()
    arrays = checkpoint.to_arrays(state)
    checkpoint.save(tmp_path / "a.pth", arrays)
    again = checkpoint.load(tmp_path / "a.pth")
    assert list(again) == list(state)
    for name, array in again.items():
        assert array.flags.c_contiguous and array.shape == state[name].shape
        np.testing.assert_array_equal(array, state[name].numpy())


def test_weights_files_keep_values_and_own_their_memory(tmp_path):
    state = {"a": torch.rand(3).bfloat16(), "b": torch.rand(3).half(), "c": torch.rand(4, 3).T}
    torch.save({"state_dict": state, "epoch": 3, "arch": "x"}, tmp_path / "a.pth")
    arrays = checkpoint.load(tmp_path / "a.pth")
    assert [a.dtype for a in arrays.values()] == [np.float32, np.float16, np.float32]
    for name in state:
        np.testing.assert_array_equal(arrays[name], state[name].float().numpy())
    shared = checkpoint.to_arrays(state)["c"]
    state["c"].zero_()
    assert shared.all()


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def test_bad_weights_files_are_refused_by_name(tmp_path, capsys):
    good = tmp_path / "good.pth"
    torch.save({"a": torch.rand(100)}, good)
    (tmp_path / "short.pth").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"a": Code()}, tmp_path / "code.pth")
    torch.save({"a": 3}, tmp_path / "number.pth")
    torch.save(torch.rand(3), tmp_path / "tensor.pth")
    torch.save({0: torch.rand(3)}, tmp_path / "nameless.pth")
    flipped = good.read_bytes().replace(torch.load(good)["a"].numpy().tobytes()[:8], bytes(8))
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name in ("short", "flipped", "empty", "text", "code", "number", "tensor", "nameless"):
        with pytest.raises(ValueError, match=f"{name}.pth") as caught:
            checkpoint.load(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.pth")
