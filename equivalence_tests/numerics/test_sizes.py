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
    calls = sizes.layers(net, (32, 36), 1)
    assert [(n, c.divisors, c.size) for n, c in calls.items()] == [
        ("0", (4, 4), (32, 36)), ("1", (1, 2), (8, 9)),
    ]  # fmt: skip
    hidden = "at which a pixel of padding does not show"
    assert sizes.faults(net, [(32, 36)], 1)[0] == f"0 sees only sizes {hidden} (32 x 36)"
    assert sizes.faults(net, [(17, 32)], 1)[0] == "1 sees only even widths (5 x 8)"
    size = cases.image_size(net, 1)
    assert sizes.faults(net, [size, size[::-1]], 1) == []
    assert net.training


@pytest.mark.parametrize("shape", [(3, 41), (41, 3)])
def test_each_axis_needs_both_kinds_of_sizes(shape):
    """With a stride along one axis, or a padding that is wrong along one, one image hides it."""
    net = nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1)
    assert sizes.faults(net, [shape], 3) == [
        f"conv2d sees only odd heights ({shape[0]} x {shape[1]})"
    ]
    assert sizes.faults(net, [(40, 41), (41, 40)], 3) == []
    along_both = nn.Conv2d(3, 4, 3, 2, 1)
    assert sizes.faults(along_both, [(40, 41)], 3) == []
    assert sizes.faults(along_both, [(40, 41), (42, 43)], 3) == [
        "conv2d sees only even heights and odd widths (40 x 41)"
    ]


def test_pools_of_functions_and_adaptive_pools_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return F.adaptive_avg_pool2d(F.max_pool2d(self.conv(x), 2), (2, 3))

    assert sizes.faults(Net(), [(24, 24)], 3) == [
        "max_pool2d sees only even sizes (24 x 24)",
        "adaptive_avg_pool2d sees only even heights and divisible widths (12 x 12)",
    ]
    size = cases.image_size(Net(), 3)
    assert sizes.faults(Net(), [size, size[::-1]], 3) == []


def test_patches_need_a_size_that_they_do_not_fill():
    """At sizes that its stride divides, such a convolution has no padding as "SAME"."""
    net = nn.Conv2d(3, 4, 2, stride=2)
    assert sizes.faults(net, [(24, 26)], 3) == ["conv2d sees only even sizes (24 x 26)"]
    assert sizes.faults(net, [(25, 27)], 3) == []
    fixed = nn.Sequential(net, nn.Flatten(), nn.Linear(4 * 12 * 13, 5))
    assert sizes.faults(fixed, [(24, 26)], 3) == []


def test_a_layer_that_is_called_again_is_another():
    pool = nn.MaxPool2d(2)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), pool, pool)
    assert list(sizes.layers(net, (12, 13), 3)) == ["1", "1:2"]
