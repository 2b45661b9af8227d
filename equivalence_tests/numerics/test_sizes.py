"""Image sizes that would hide a wrong padding are refused with this reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from equivalence_tests.parity import inputs, sizes
from equivalence_tests.parity.ports import cases

pytestmark = [pytest.mark.control, pytest.mark.quick]

WRONG = {"one pixel in front alone": (1, 0, 1, 0), "SAME at even sizes": (0, 1, 0, 1)}
"""{wrong padding: pixels on the left, right, top, bottom}."""


@pytest.mark.parametrize("size, hidden", [(12, "one pixel in front alone"), (13, None)])
def test_a_wrong_padding_shows_at_one_parity_only(size, hidden):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator)
    kernel = torch.randn(4, 3, 3, 3, generator=generator)
    right = F.conv2d(image, kernel, stride=2, padding=1)
    for name, pads in WRONG.items():
        got = F.conv2d(F.pad(image, pads), kernel, stride=2)
        assert (got.shape == right.shape and torch.equal(got, right)) == (name == hidden)
    total = 3 - (2 if size % 2 == 0 else 1)
    same = F.conv2d(F.pad(image, (total // 2, total - total // 2) * 2), kernel, stride=2)
    assert torch.equal(same, right) == (size % 2 == 1)


@pytest.mark.parametrize(
    "arch, stem, size, words",
    [
        ("resnet18", "imagenet", (33, 65), ["conv1 sees only odd", "maxpool sees only odd"]),
        ("resnet18", "imagenet", (45, 56), ["layer2.0.conv1 sees only even sizes (12 x 14)"]),
        ("resnet50", "imagenet", (45, 56), ["layer2.0.conv2 sees only even sizes (12 x 14)"]),
        ("resnet20", None, (9, 10), ["layer3.0.conv1 sees only odd sizes (5 x 5)"]),
        ("basic_cnn", None, (33, 40), ["maxpool:2 sees only even", "maxpool:3 sees only even"]),
    ],
)
def test_sizes_that_hide_a_wrong_padding_are_refused(arch, stem, size, words):
    with pytest.raises(ValueError) as refusal:
        inputs.make_case(arch, stem=stem, size=size)
    assert all(word in str(refusal.value) for word in words)


def test_a_network_of_ones_own_gets_a_size_that_hides_nothing():
    net = nn.Sequential(nn.Conv2d(1, 2, 7, stride=4, padding=3), nn.MaxPool2d((1, 2)), nn.Flatten())
    calls = sizes.strided_calls(net, (32, 36), 1)
    assert calls == {"0": ((4, 4), (32, 36)), "1": ((1, 2), (8, 9))}
    assert sizes.faults(calls)[0] == "0 sees only divisible sizes (32 x 36)"
    assert sizes.faults(sizes.strided_calls(net, cases.image_size(net, 1), 1)) == []
    assert net.training


def test_a_layer_that_is_called_again_is_another():
    pool = nn.MaxPool2d(2)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), pool, pool)
    assert list(sizes.strided_calls(net, (12, 13), 3)) == ["1", "1:2"]
