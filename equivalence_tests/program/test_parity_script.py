"""scripts/parity.py reports equal networks, and where and why networks differ."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

import torch_ref
from equivalence_tests.parity import command, inputs, predictions
from equivalence_tests.program.command import refused, run_script
from flax_resnet.commands import cli
from flax_resnet.config import DataConfig, TrainConfig
from flax_resnet.data.sources import open_dataset
from flax_resnet.errors import InputError
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.weights.convert import Architecture
from torch_ref import checkpoint

HERE = __name__


def sound():
    torch.manual_seed(0)
    return torch_ref.create_model("resnet20")


def with_another_eps():
    model = sound()
    model.layer2[0].bn1.eps = 1e-3
    return model


def with_another_momentum():
    model = sound()
    model.layer3[1].bn2.momentum = 0.01
    return model


def with_same_padding():
    model = sound()
    conv = model.layer2[0].conv1
    pad = nn.functional.pad

    def forward(x):
        return conv._conv_forward(pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1)), conv.weight, None)

    conv.padding, conv.forward = (0, 0), forward
    return model


def of_another_make():
    """A network with pytorch-cifar's names in a wrapper."""
    wrapper = nn.Module()
    wrapper.module = sound()
    wrapper.module.linear = wrapper.module.fc
    del wrapper.module.fc
    net = wrapper.module

    def forward(x):
        x = net.relu(net.bn1(net.conv1(x)))
        for stage in net.stages():
            x = stage(x)
        return net.linear(net.avgpool(x).flatten(1))

    net.forward, wrapper.forward = forward, forward
    return wrapper


def of_gray_images():
    return torch_ref.create_model("resnet20", in_channels=1)


def changed(change, make=sound):
    """The network with another forward pass: `change(original forward, images)`."""
    model = make()
    forward = model.forward
    model.forward = lambda images: change(forward, images)
    return model


def of_a_dict():
    return changed(lambda forward, images: {"logits": forward(images)})


def frozen():
    return sound().requires_grad_(False)


def of_log_probabilities():
    return changed(lambda forward, images: forward(images).log_softmax(1))


def shifted():
    return changed(lambda forward, images: forward(images) + 100)


def other_on_squares():
    def change(forward, images):
        square = images.shape[2] == images.shape[3]
        return forward(images.flip(3) if square else images)

    return changed(change, of_gray_images)


class Dropout(nn.Module):
    """Drops in evaluation too."""

    def forward(self, values):
        return nn.functional.dropout(values, 0.5)


class ScaledDropout(nn.Module):
    """Does not drop in evaluation, and changes its values."""

    def forward(self, values):
        return 3 * nn.functional.dropout(values, 0.5, self.training)


def with_last(layer):
    model = sound()
    model.avgpool = nn.Sequential(model.avgpool, layer)
    return model


def dropping():
    return with_last(Dropout())


def scaling():
    return with_last(ScaledDropout())


def sound_dropout():
    return with_last(nn.Dropout(0.5))


def with_a_broken_forward():
    model = sound()
    model.layer2[0].forward = lambda x: x @ x
    return model


def of_no_known_structure():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4, 2))


def not_a_network():
    return 1


def report(tmp_path, *arguments):
    outcome = run_script("parity.py", *arguments, "--report", tmp_path / "report")
    return outcome, json.loads((tmp_path / "report" / "parity.json").read_text())


def test_our_own_network_is_equal(tmp_path, capfd):
    outcome, document = report(tmp_path, "--arch", "resnet20", "--image-size", 12, 13)
    assert outcome.status == 0, outcome.err
    assert capfd.readouterr().err == ""  # not a word of the compiler
    assert "equal: every tensor agrees to rounding" in outcome.out
    assert "layer3.2.bn2" in outcome.out
    rows = document["rows"]["training"]
    assert {r["phase"] for r in rows} >= {"forward", "gradient", "batch_norm", "optimizer"}
    assert {r["verdict"] for r in rows} <= {"equal", "rounding"}
    assert document["first_divergence"] is None and document["environment"]["revision"]
    page = (tmp_path / "report" / "parity.html").read_text()
    assert page.count("<svg") == 2 and 'src="http' not in page and 'href="http' not in page
    assert (tmp_path / "report" / "parity.png").stat().st_size > 10_000


EMPTY = {"jax": [], "torch": []}


@pytest.mark.parametrize("make", [sound, of_another_make, of_a_dict, frozen, sound_dropout])
def test_a_network_of_ones_own_is_equal(make):
    outcome = run_script("parity.py", "--torch-model", f"{HERE}:{make.__name__}")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    "make, phase, module, cause",
    [
        (with_another_eps, "forward", "layer2.0.bn1", "eps is 0.001 instead of 1e-05"),
        (with_another_momentum, "batch_norm", "layer3.1.bn2", "momentum is 0.01 instead of 0.1"),
        (with_same_padding, "forward", "layer2.0.conv1", 'padding is "SAME"'),
    ],
)
def test_a_difference_is_found_and_explained(make, phase, module, cause, tmp_path):
    outcome, document = report(tmp_path, "--torch-model", f"{HERE}:{make.__name__}")
    assert outcome.status == 1 and cause in outcome.err and module in outcome.err
    first = document["first_divergence"]
    assert (first["phase"], first["module"]) == (phase, module)
    assert cause in first["causes"][0]
    assert document["first"]["torch_name"] == module and document["unmatched"] == EMPTY
    assert "Divergent" in (tmp_path / "report" / "parity.html").read_text()


@pytest.mark.parametrize("make", [of_log_probabilities, shifted])
def test_what_the_network_returns_is_compared(make, tmp_path):
    """The loss of these networks is that of a sound one."""
    outcome, document = report(tmp_path, "--torch-model", f"{HERE}:{make.__name__}")
    assert outcome.status == 1 and "[logits]" in outcome.err
    assert document["first_divergence"]["mode"] == "evaluation"


@pytest.mark.parametrize("make", [dropping, scaling])
def test_dropout_that_acts_in_evaluation_is_a_difference(make):
    outcome = run_script("parity.py", "--torch-model", f"{HERE}:{make.__name__}")
    assert outcome.status == 1 and "evaluation mode" in outcome.err


def test_a_difference_on_the_images_of_the_data_alone_is_found(tmp_path):
    """Random images are not square."""
    for make, status in (of_gray_images, 0), (other_on_squares, 1):
        outcome, document = report(
            tmp_path, "--torch-model", f"{HERE}:{make.__name__}", "--dataset", "digits"
        )
        assert outcome.status == status, outcome.err
        assert document["first_divergence"] is None
    assert "the logits of the images of digits" in outcome.err
    assert "The logits of the images of digits" in (tmp_path / "report" / "parity.html").read_text()


def test_weights_of_ones_own_and_their_predictions(tmp_path):
    path = tmp_path / "mine.pth"
    model = torch_ref.create_model("resnet20", in_channels=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    checkpoint.save(path, inputs.random_state(shapes, inputs.random_numbers()))
    outcome, document = report(
        tmp_path, "--checkpoint", path, "--dataset", "digits", "--image-size", 8, 9
    )
    assert outcome.status == 0, outcome.err
    assert document["predictions"]["agree"] == document["predictions"]["images"] == 360
    assert "with the mean and std of the training images" in outcome.out
    outcome = run_script(
        "parity.py", "--checkpoint", path, "--dataset", "digits", "--image-size", 8, 9,
        "--mean", 0.3, "--std", 0.4,
    )  # fmt: skip
    assert outcome.status == 0 and "of the training images" not in outcome.out


def test_predictions_are_compared_with_the_classes_of_the_run():
    """Classes are matched by name; their order may differ from the data set's."""
    shapes = Architecture("basic_cnn", 10, 1, None).shapes()
    arrays = inputs.random_state(shapes, inputs.random_numbers())
    case = inputs.case_of_weights(arrays, "basic_cnn", None)
    data = DataConfig(dataset="digits", image_size=32, mean=(0.3,), std=(0.3,))
    turned = {name: arrays[name][::-1] for name in ("fc.weight", "fc.bias")}
    other = dataclasses.replace(case, arrays=arrays | turned)
    names = ((), tuple("9876543210"), tuple("0123456789"))
    plain, matched, unmatched = (
        predictions.agreement(each, data, None, order)["accuracy"]
        for each, order in zip((case, other, other), names, strict=True)
    )
    assert plain == matched != unmatched
    with pytest.raises(InputError, match="has the classes 0, 1, .*, not a, b"):
        predictions.agreement(case, data, None, tuple("abcdefghij"))


def test_fresh_weights_are_refused_because_they_hide_differences(tmp_path):
    checkpoint.save(tmp_path / "fresh.pth", checkpoint.to_arrays(sound().state_dict()))
    outcome = run_script("parity.py", "--checkpoint", tmp_path / "fresh.pth")
    refused(outcome, "fresh.pth", "bn1.weight is constant", "more")
    assert len(outcome.err) < 400


def test_predictions_are_of_the_whole_test_split(tmp_path, monkeypatch):
    """The run's limit on test images is not applied."""
    few = cli.merge(TrainConfig(), {"data": {"dataset": "digits", "eval_images": 5}})
    RunDirectory(tmp_path).write_config(few)
    words = ["parity.py", "--checkpoint", str(tmp_path), "--dataset", "digits"]
    monkeypatch.setattr(sys, "argv", words)
    assert len(open_dataset(command.data_config(command.parse())).test) == 360


def test_without_torch_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("torch_ref", "equivalence_tests.parity"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(
        "equivalence_tests.parity.engine.own_model", raising=False
    )  # a second way to it
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(run_script("parity.py", "--arch", "resnet20"), "--extra torch")


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--arch", "--checkpoint", "--torch-model"]),
        (["--arch", "resnet19"], ["resnet19", "resnet18"]),
        (["--checkpoint", "nowhere.pth"], ["nowhere.pth"]),
        (["--checkpoint", "nowhere.safetensors"], ["nowhere.safetensors"]),
        (["--torch-model", "no_such_module:net"], ["no_such_module"]),
        (["--torch-model", f"{HERE}:no_such_function"], ["no_such_function"]),
        (["--torch-model", f"{HERE}:not_a_network"], ["no nn.Module"]),
        (["--arch", "resnet20", "--stem", "cifar"], ["own stem"]),
        (["--checkpoint", "nowhere.pth", "--stem", "cifar"], ["--stem", "--arch"]),
        (["--arch", "resnet20", "--mean", "1"], ["--mean", "--dataset"]),
        (["--arch", "resnet20", "--dataset", "digts"], ["digts", "'digits'"]),
        (["--arch", "resnet20", "--dataset", "digits", "--mean", "1"], ["--mean and --std"]),
        (["--arch", "resnet18", "--stem", "cfar"], ["did you mean 'cifar'"]),
        (["--arch", "resnet20", "--image-size", "32"], ["--image-size", "H and W are equal"]),
        (
            ["--torch-model", f"{HERE}:sound", "--image-size", "33", "17"],
            ["--image-size", "layer2.0.conv1 sees only odd sizes (33 x 17)"],
        ),
        (["--torch-model", f"{HERE}:of_no_known_structure"], ["none of this", "--jax-model"]),
        (["--torch-model", f"{HERE}:with_a_broken_forward"], ["forward pass", "RuntimeError"]),
        (["--arch", "resnet20", "--image-size", "0"], ["--image-size", "1 or more"]),
        (["--arch", "resnet20", "--image-size", "8", "9", "3"], ["--image-size", "one for both"]),
        (["--arch", "resnet20", "--report", __file__], ["--report", "no directory"]),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    refused(run_script("parity.py", *arguments), *words)
