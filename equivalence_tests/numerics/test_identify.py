"""The network of given weights is recognised from their names and shapes."""

import numpy as np
import pytest

import flax_resnet
from equivalence_tests.parity import inputs
from flax_resnet.config import WITH_STEMS
from flax_resnet.weights import convert

ALL = [
    (arch, stem)
    for arch in flax_resnet.list_models()
    for stem in (("imagenet", "cifar") if arch in WITH_STEMS else (None,))
]
QUICK = ("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "resnet20", "resnet32", "basic_cnn")
CASES = [
    pytest.param(
        *case, marks=() if case[0] in QUICK else pytest.mark.slow, id=f"{case[0]}-{case[1]}"
    )
    for case in ALL
]


def blank(arch: str, stem: str | None) -> dict:
    shapes = inputs.state_shapes(arch, stem)
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("arch, stem", CASES)
def test_every_network_is_told_from_every_other(arch, stem):
    arrays = blank(arch, stem)
    found = convert.nearest_architecture(arrays)
    assert found == (arch, inputs.NUM_CLASSES, 3, stem, None)
    assert found.shapes() == inputs.state_shapes(arch, stem)
    assert convert.differing(found.shapes(), arrays) == set()


@pytest.mark.parametrize("arch", ["resnet20", "resnet110"])
def test_option_b_is_told_from_option_a_and_crosses_both_ways(arch):
    """Weights with akamaster's names (shortcut.0, shortcut.1) are recognised as option B."""
    case = inputs.make_case(arch, shortcut="projection")
    names = {n: n.replace("downsample", "shortcut").replace("fc.", "linear.") for n in case.arrays}
    foreign = {f"module.{names[name]}": array for name, array in case.arrays.items()}
    arrays = convert.translate_names(foreign)
    found = convert.nearest_architecture(arrays)
    assert found == (arch, inputs.NUM_CLASSES, 3, None, "projection")
    assert found.shapes() == inputs.state_shapes(arch, shortcut="projection")
    model = flax_resnet.create_model(arch, inputs.NUM_CLASSES, shortcut="projection")
    back = flax_resnet.state_dict(flax_resnet.load_state_dict(model, foreign))
    assert list(back) == list(case.arrays)
    assert all(np.array_equal(back[name], array) for name, array in case.arrays.items())
    with pytest.raises(ValueError, match="unexpected layer2.0.downsample.*shortcut projection"):
        flax_resnet.load_state_dict(flax_resnet.create_model(arch, inputs.NUM_CLASSES), foreign)


def test_broken_weights_are_still_recognised():
    arrays = blank("resnext50_32x4d", "cifar")
    odd = {"layer2.0.conv1.weight", "fc.bias", "bn1.bias"}
    broken = {name: array for name, array in arrays.items() if name not in odd}
    broken["layer3.1.bn1.weight"] = np.zeros(3)
    broken["head.weight"] = np.zeros(3)
    found = convert.nearest_architecture(broken)
    assert (found.arch, found.stem) == ("resnext50_32x4d", "cifar")
    assert convert.differing(found.shapes(), broken) == odd | {"layer3.1.bn1.weight", "head.weight"}


@pytest.mark.parametrize("shape", [(), (16,), (16, 0, 3, 3), (0, 3, 7, 7)])
def test_weights_of_no_network_are_named_not_crashed_on(shape):
    foreign = {"features.0.weight": np.zeros(3), "conv1.weight": np.zeros(shape), "fc.weight": 1.0}
    with pytest.raises(ValueError, match="unexpected features.0.weight.*nearest architecture is"):
        flax_resnet.load_state_dict(flax_resnet.create_model("basic_cnn"), foreign)
