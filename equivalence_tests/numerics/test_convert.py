"""Weights are converted between the frameworks bit for bit, or refused."""

import dataclasses
import re
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
import torchvision
from flax import nnx

import flax_resnet
import torch_ref
from equivalence_tests.parity import engine, inputs, jax_side, tolerances, torch_side
from flax_resnet.config import WITH_STEMS
from flax_resnet.errors import InputError
from flax_resnet.weights import convert
from torch_ref import checkpoint

CHECKPOINTS = Path(__file__).parents[2].parent / "shared/data/checkpoints"
TORCHVISION = list(WITH_STEMS)
BOTH_STEMS = [(arch, stem) for arch in TORCHVISION for stem in ("imagenet", "cifar")]
OWN_STEM = [(arch, None) for arch in flax_resnet.list_models() if arch not in TORCHVISION]


def model_of(case):
    """Our network with all weights 0."""
    blank = {n: np.zeros_like(a) for n, a in case.arrays.items()}
    return jax_side.make_model(dataclasses.replace(case, arrays=blank), np.float32)


def same(got: dict, expected: dict) -> bool:
    return list(got) == list(expected) and all(
        got[n].dtype == expected[n].dtype and np.array_equal(got[n], expected[n]) for n in expected
    )


@pytest.mark.parametrize("arch, stem", BOTH_STEMS + OWN_STEM)
def test_every_name_and_shape_is_the_twins(arch, stem):
    model = nnx.eval_shape(lambda: flax_resnet.create_model(arch, inputs.NUM_CLASSES, stem=stem))
    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    ours = {
        convert.torch_name(path, len(leaf.shape)): convert.torch_shape(path, leaf.shape)
        for path, leaf in leaves
    }
    assert ours == inputs.state_shapes(arch, stem)


LARGE = re.compile("101|152|34|wide|56|44|32$")
"""Networks that differ from others only in depth or width."""


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[pytest.mark.slow] if LARGE.search(arch) else [])
        for arch in flax_resnet.list_models()
    ],
)
def test_the_round_trip_is_exact(arch):
    case = inputs.make_case(arch)
    exported = flax_resnet.state_dict(jax_side.make_model(case, np.float32))
    assert same(exported, case.arrays)
    assert all(array.flags.c_contiguous for array in exported.values())


@pytest.mark.quick
def test_converted_weights_are_copies():
    case = inputs.make_case("resnet20")
    twin = torch_side.make_model(case, np.float32)
    shared = {name: tensor.numpy() for name, tensor in twin.state_dict().items()}
    model = flax_resnet.load_state_dict(model_of(case), shared)
    for tensor in twin.state_dict().values():
        tensor.add_(1)
    exported = flax_resnet.state_dict(model)
    assert same(exported, case.arrays)
    for array in exported.values():
        array += 1
    assert same(flax_resnet.state_dict(model), case.arrays)


def hugging_face(name: str) -> str:
    """Translates torchvision's name to that of transformers' ResNetForImageClassification.

    Its modules: embedder, encoder.stages[i].layers[j].{shortcut, layer[k]}, classifier[1].
    """
    if name.startswith("fc."):
        return name.replace("fc.", "classifier.1.")
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if m := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"resnet.embedder.embedder.{kinds[m[1]]}.{m[2]}"
    stage, block, part, number, leaf = re.fullmatch(
        r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", name
    ).groups()
    place = f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}"
    if part == "downsample.":
        return f"{place}.shortcut.{kinds[number]}.{leaf}"
    return f"{place}.layer.{int(number) - 1}.{kinds[part]}.{leaf}"


def pytorch_cifar(name: str) -> str:
    return name.replace("downsample", "shortcut").replace("fc.", "linear.")


DIALECTS = {
    "torchvision and timm": lambda name: name,
    "Hugging Face": hugging_face,
    "pytorch-cifar": pytorch_cifar,
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "Lightning": lambda name: f"model.{name}",
    "compiled under DDP": lambda name: f"module._orig_mod.{name}",
    "pytorch-cifar in Lightning, compiled": lambda name: f"net._orig_mod.{pytorch_cifar(name)}",
    "Hugging Face under DataParallel": lambda name: f"module.{hugging_face(name)}",
}


@pytest.mark.quick
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_names_of_other_projects_are_translated(arch, dialect):
    case = inputs.make_case(arch)
    foreign = {DIALECTS[dialect](name): array for name, array in case.arrays.items()}
    assert len(foreign) == len(case.arrays)
    assert same(convert.translate_names(foreign), case.arrays)
    if arch == "resnet18":
        model = flax_resnet.load_state_dict(model_of(case), foreign)
        assert same(flax_resnet.state_dict(model), case.arrays)


def test_torchvisions_own_state():
    net = torchvision.models.resnet18(num_classes=inputs.NUM_CLASSES)
    arrays = checkpoint.to_arrays(net.state_dict())
    model = flax_resnet.load_state_dict(model_of(inputs.make_case("resnet18")), arrays)
    assert same(flax_resnet.state_dict(model), arrays)


def test_a_name_given_twice_is_refused():
    case = inputs.make_case("resnet20")
    twice = case.arrays | {"linear.weight": case.arrays["fc.weight"] + 1}
    with pytest.raises(InputError, match="linear.weight"):
        flax_resnet.load_state_dict(model_of(case), twice)


@pytest.mark.quick
def test_all_faults_in_one_error_and_nothing_loaded():
    case = inputs.make_case("resnet20")
    model = model_of(case)
    before = flax_resnet.state_dict(model)
    bad = dict(case.arrays)
    del bad["layer1.0.conv1.weight"], bad["bn1.bias"]
    bad["layer9.conv.weight"] = np.ones(3)
    bad["fc.weight"] = bad["fc.weight"].T
    bad["fc.bias"] = bad["fc.bias"] * np.float32("nan")
    bad["bn1.running_var"] = bad["bn1.running_var"] + np.float32("inf")
    with pytest.raises(InputError) as error:
        flax_resnet.load_state_dict(model, bad)
    message = str(error.value)
    assert "\n" not in message
    for words in (
        "missing bn1.bias, layer1.0.conv1.weight",
        "unexpected layer9.conv.weight",
        "fc.weight has shape (64, 7) instead of (7, 64)",
        "fc.bias has non-finite values",
        "bn1.running_var has non-finite values",
    ):
        assert words in message
    assert same(flax_resnet.state_dict(model), before)


@pytest.mark.parametrize("other", ["resnet32", "resnet18", "basic_cnn"])
def test_weights_of_another_network_are_refused(other):
    with pytest.raises(InputError, match="missing|unexpected"):
        model = model_of(inputs.make_case("resnet20"))
        flax_resnet.load_state_dict(model, inputs.make_case(other).arrays)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_widths_keep_their_values(dtype):
    case = inputs.make_case("resnet20")
    cast = {n: a.astype(dtype) if a.ndim else a for n, a in case.arrays.items()}
    model = flax_resnet.load_state_dict(model_of(case), cast)
    expected = {n: a.astype(np.float32) if a.ndim else a for n, a in cast.items()}
    assert same(flax_resnet.state_dict(model), expected)


def transposed_in_memory(array):
    return array.T.copy().T


def reversed_in_memory(array):
    return array[..., ::-1].copy()[..., ::-1] if array.ndim else array


def test_arrays_that_are_not_contiguous_keep_their_values():
    case = inputs.make_case("resnet20")
    for change in (transposed_in_memory, reversed_in_memory):
        odd = {name: change(array) for name, array in case.arrays.items()}
        assert not odd["conv1.weight"].flags.c_contiguous
        model = flax_resnet.load_state_dict(model_of(case), odd)
        assert same(flax_resnet.state_dict(model), case.arrays)


def test_files_older_than_the_count_of_batches_load():
    case = inputs.make_case("resnet20")
    old = {n: a for n, a in case.arrays.items() if not n.endswith("num_batches_tracked")}
    loaded = flax_resnet.state_dict(flax_resnet.load_state_dict(model_of(case), old))
    assert loaded["bn1.num_batches_tracked"] == 0 and loaded.keys() == case.arrays.keys()
    with pytest.raises(InputError, match="missing layer1.0.bn1.num_batches_tracked"):
        some = old | {"bn1.num_batches_tracked": np.array(3)}
        flax_resnet.load_state_dict(model_of(case), some)


@pytest.mark.control
def test_swapped_kernel_axes_show_in_the_numbers_only():
    """Swapping H and W of square kernels both ways keeps names, shapes and the round trip."""
    case = inputs.make_case("resnet20")
    swapped = convert._LEAVES | {("kernel", 4): ("weight", (3, 2, 1, 0))}
    with mock.patch.dict(convert._LEAVES, swapped):
        model = flax_resnet.load_state_dict(model_of(case), case.arrays)
        assert same(flax_resnet.state_dict(model), case.arrays)
        rows = engine.compare(engine.run_jax(case, jit=True), engine.run_torch(case))
    assert rows[0].name == "conv1" and rows[0].norm_relative > 0.1


@pytest.mark.parametrize("arch", ["resnet20", "resnet32"])
def test_trained_checkpoints_give_the_same_logits(arch):
    found = sorted(CHECKPOINTS.glob(f"{arch}-*.th"))
    if not found:
        pytest.skip(f"no {arch} checkpoint beside the repository")
    arrays = checkpoint.load(found[0])
    case = inputs.Case(
        arch=arch,
        arrays=arrays,
        images=inputs.random_numbers().standard_normal((1, 8, 32, 32, 3), np.float32),
        labels=np.zeros((1, 8), int),
        num_classes=10,
    )
    got = engine.run_jax(case, train=False)
    twin = torch_ref.create_model(arch)
    names = {n: n.removeprefix("module.").replace("linear.", "fc.") for n in arrays}
    renamed = {names[n]: torch.from_numpy(a) for n, a in arrays.items()}
    assert twin.load_state_dict(renamed, strict=False).unexpected_keys == []
    state = checkpoint.to_arrays(twin.state_dict())
    reference = engine.run_torch(dataclasses.replace(case, arrays=state), train=False)
    rows = engine.compare(got, reference)
    assert engine.worst(rows, "forward", "loss").norm_relative <= tolerances.FORWARD
    predictions = reference["forward"]["fc"].argmax(1)
    assert np.array_equal(got["forward"]["fc"].argmax(1), predictions)
    assert len(set(predictions)) > 1


@hypothesis.given(
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net."]), max_size=4)
)
def test_any_stack_of_wrappers_comes_off(prefixes):
    names = ["conv1.weight", "layer1.0.bn2.running_var", "layer4.1.downsample.0.weight", "fc.bias"]
    wrapped = {"".join(prefixes) + name: np.full(1, i) for i, name in enumerate(names)}
    assert convert.translate_names(wrapped) == dict(zip(names, wrapped.values(), strict=True))
