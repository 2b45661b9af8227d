"""The comparison engine refuses inputs that cannot fail and never reports a difference as equal."""

import dataclasses

import numpy as np
import pytest

from equivalence_tests.parity import engine, inputs

pytestmark = [pytest.mark.quick, pytest.mark.control]


def broken(**changes):
    """A sound case with images or arrays changed by the given functions."""
    case = inputs.make_case("resnet20")
    arrays = dict(case.arrays)
    images = changes.pop("images", lambda x: x)(case.images.copy())
    for name, change in changes.items():
        name = name.replace("__", ".")
        arrays[name] = change(arrays, arrays[name])
    return dataclasses.replace(case, arrays=arrays, images=images)


def mirrored(x):
    x[0, 1, :, 7:] = x[0, 1, :, 5::-1]
    return x


@pytest.mark.parametrize(
    "case, word",
    [
        (lambda: broken(images=np.ones_like), "constant image"),
        (lambda: broken(images=lambda x: x[..., :12, :]), "H and W are equal"),
        (lambda: broken(images=lambda x: x[:, :, :11, :13]), "both odd"),
        (lambda: broken(images=mirrored), "mirror image"),
        (lambda: broken(images=lambda x: x[:, [0, 0]]), "two equal images"),
        (lambda: broken(images=lambda x: np.tile(x, (1, 1, 12, 7, 1))), "too many values"),
        (lambda: broken(images=lambda x: x + np.float64(1e-12)), "float32"),
        (lambda: broken(bn1__weight=lambda _, x: np.ones_like(x)), "bn1.weight is constant"),
        (lambda: broken(bn1__running_mean=lambda _, x: x * 0), "bn1.running_mean is constant"),
        (lambda: broken(bn1__running_var=lambda a, _: a["bn1.weight"]), "bn1.weight and bn1"),
        (lambda: broken(conv1__weight=lambda _, x: x + x.swapaxes(2, 3)), "its own transpose"),
        (lambda: broken(fc__bias=lambda _, x: x + np.float64(1e-12)), "fc.bias does not fit"),
    ],
)
def test_inputs_that_cannot_fail_are_refused(case, word):
    found = inputs.faults(case())
    assert any(word in fault for fault in found), found


def test_inputs_that_can_fail_are_taken():
    for arch in ("resnet20", "resnet18", "basic_cnn"):
        assert inputs.faults(inputs.make_case(arch)) == []
    tied = inputs.make_case("resnet20", zero_init=True)
    assert inputs.faults(tied, zero_init=True) == []
    assert "layer1.0.bn2.weight is constant" in inputs.faults(tied)
    with pytest.raises(ValueError, match="H and W are equal"):
        inputs.make_case("resnet20", size=(12, 12))


def test_the_last_norm_of_every_block_ends_its_branch():
    for arch, ends in (("resnet18", "bn2"), ("resnet50", "bn3"), ("resnet110", "bn2")):
        names = inputs.residual_ends(inputs.state_shapes(arch))
        assert {name.split(".")[-1] for name in names} == {ends}
        assert len(names) == {"resnet18": 8, "resnet50": 16, "resnet110": 54}[arch]


def trace(values, phase="gradient", name="fc.bias"):
    return {phase: {name: np.array(values)}}


def test_a_row_measures_the_difference():
    (row,) = engine.compare(trace([3.0, 4.5]), trace([3.0, 4.0]))
    assert row[:3] == ("gradient", "fc.bias", (2,))
    assert row.max_relative == 0.125 and row.norm_relative == 0.1
    assert row.ulp == 0.5 / np.spacing(4.0)
    assert engine.compare(trace([1.0]), trace([1.0]))[0][3:] == (0, 0, 0)
    narrow = engine.compare(trace(np.float32([1 + 2**-23])), trace(np.float32([1])))
    assert narrow[0].ulp == 1


def test_nan_zero_and_other_shapes_are_never_called_equal():
    assert engine.compare(trace([np.nan]), trace([1.0]))[0].norm_relative == np.inf
    assert engine.compare(trace([np.nan]), trace([np.nan]))[0].norm_relative == np.inf
    assert engine.compare(trace([1e-30]), trace([0.0]))[0].norm_relative == np.inf
    assert engine.compare(trace([0.0]), trace([0.0]))[0].norm_relative == 0
    assert engine.compare(trace([1.0]), trace([1.0, 1.0]))[0].norm_relative == np.inf
    for phase in ("gradient", "forward"):
        with pytest.raises(ValueError, match="conv1"):
            engine.compare(trace([1.0], phase, "conv1"), trace([1.0], phase))
    with pytest.raises(ValueError, match="one side only: fc.bias"):
        engine.compare({"gradient": {}}, trace([1.0]))


def test_a_budget_is_twice_the_error_of_the_reference_and_some_ulp():
    truth = trace([1.0, 0.0])
    reference, good, bad = trace([1.01, 0]), trace([1.021, 0]), trace([1.023, 0])
    (row,) = engine.budgets(good, reference, truth, factor=2, ulps=2e-3)
    assert row.within and row.bound == pytest.approx(0.022)
    assert not engine.budgets(bad, reference, truth, factor=2, ulps=2e-3)[0].within
    assert not engine.budgets(trace([np.nan, 0]), reference, truth, factor=2, ulps=1)[0].within
