"""int8 ONNX files: what they say, what they lose, and what is refused."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import torch_ref
from equivalence_tests.program.command import refused, run_script
from flax_resnet.commands import convert_int8
from flax_resnet.errors import InputError
from flax_resnet.interop import int8
from flax_resnet.interop.loaded_run import load_run
from torch_ref import onnx_file


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The directory of a run on the digits."""
    run_dir = tmp_path_factory.mktemp("run") / "digits"
    flags = ["--arch", "basic_cnn", "--epochs", 3, "--run-dir", run_dir]
    assert run_script("train.py", *flags).status == 0
    return run_dir


@pytest.fixture(scope="module")
def converted(digits):
    """The int8 file of the run, and what its making printed."""
    path = digits.parent / "digits.onnx"
    outcome = run_script("convert.py", digits, path, "--int8", "--calibration-images", 100)
    assert outcome.status == 0, outcome.err
    return path, outcome.out


def test_predictions_are_those_of_float32(digits, converted):
    run, (path, said) = load_run(digits), converted
    dataset = convert_int8._dataset(run, None)
    images = np.stack([dataset.test[index] for index in range(len(dataset.test))])
    inputs = convert_int8._inputs(images, run)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"images": inputs})[0].argmax(-1)
    equal = np.mean(found == run.predict(images).argmax(-1))
    assert equal >= 0.95
    accuracy = np.mean(found == dataset.test.labels)
    assert f"{accuracy:.4f} in int8; {equal:.2%} of the predictions are equal" in said


def test_the_file_says_what_calibrated_it(converted):
    path, said = converted
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert facts["calibration"] == {"dataset": "digits", "images": 100, "seed": 0}
    assert facts["class_names"] == list("0123456789")
    assert "calibrated on 100 training images of digits, seed 0" in said


def test_weights_are_stored_in_eight_bits(converted):
    path, _ = converted
    large = [t for t in onnx.load(path).graph.initializer if np.prod(t.dims) > 1000]
    assert large and all(t.data_type == onnx.TensorProto.INT8 for t in large)


@pytest.mark.control
@pytest.mark.parametrize("before, noisy", [
    ("layer2.1.conv1", "layer2.1.conv2"), ("layer2.0.conv2", "layer2.1.conv1"),
])  # fmt: skip
def test_the_layer_with_the_most_noise_is_found(tmp_path, before, noisy):
    """Negative control: one output of a layer is so large that its scale loses all others. A ReLU
    follows one of the noisy layers and not the other."""
    torch.manual_seed(0)
    net = onnx_file.fold_batchnorm(torch_ref.create_model("resnet20", num_classes=4).eval())
    with torch.no_grad():
        net.get_submodule(before).bias[0] = 1e4
        net.get_submodule(noisy).weight[:, 0] = 0
    onnx_file.save(tmp_path / "float32.onnx", net, (3, 16, 16), {})
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((4, 3, 16, 16)).astype(np.float32) for _ in range(2)]
    files = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    int8.quantize(*files, lambda: batches, {})
    noise = int8.signal_to_noise(*files, lambda: batches)
    assert noisy in list(noise)[: convert_int8.NOISIEST]
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert noise.keys() == {name for name, m in net.named_modules() if isinstance(m, kinds)}


def test_a_loss_of_accuracy_is_a_warning_that_names_layers(digits, tmp_path):
    """One channel is so large that its scale loses all others, and no later layer uses it."""
    before, weights = tmp_path / "digits.safetensors", tmp_path / "large.safetensors"
    assert run_script("convert.py", digits, before).status == 0
    arrays = load_file(before)
    arrays["conv1.bias"][0] = 1e4
    arrays["conv2.weight"][:, 0] = 0
    save_file(arrays, weights)
    flags = ["--int8", "--calibrate", "digits", "--calibration-images", 50]
    outcome = run_script("convert.py", weights, tmp_path / "net.onnx", *flags)
    assert outcome.status == 0, outcome.err
    assert re.search(r"int8 loses 0\.[1-9]\d+ of the accuracy; .* noise: .*conv2 \(", outcome.err)
    sound = run_script("convert.py", before, tmp_path / "sound.onnx", *flags)
    assert "int8 loses" not in sound.err


def test_what_does_not_fit_is_refused(digits, tmp_path):
    out = tmp_path / "net.onnx"
    refused(run_script("convert.py", digits, tmp_path / "net.pth", "--int8"), "--int8", ".onnx")
    refused(run_script("convert.py", digits, out, "--calibrate", "digits"), "--calibrate", "--int8")
    zero = ["--int8", "--calibration-images", 0]
    refused(run_script("convert.py", digits, out, *zero), "--calibration-images")
    assert not out.exists()


def test_calibration_images_of_other_classes_are_refused(digits, folder, tmp_path):
    flags = ["--int8", "--calibrate", f"folder:{folder}"]
    refused(run_script("convert.py", digits, tmp_path / "net.onnx", *flags), "ant", "classes")
    assert not list(tmp_path.iterdir())


def test_a_run_in_float64_is_refused(digits, tmp_path):
    run = load_run(digits)
    wide = replace(
        run, config=replace(run.config, model=replace(run.config.model, dtype="float64"))
    )
    with pytest.raises(InputError, match="net.onnx: --int8 is not for a run in float64"):
        convert_int8.write(tmp_path / "net.onnx", wide, None, 10)


def test_a_few_images_calibrate(insects, tmp_path):
    """One of each class, of which no test images could be cut off."""
    for name, colour in (("ant", "black"), ("bee", "yellow")):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "few" / name / "a.png")
    flags = ["--int8", "--calibrate", f"folder:{tmp_path / 'few'}"]
    outcome = run_script("convert.py", insects, tmp_path / "net.onnx", *flags)
    assert outcome.status == 0, outcome.err
    assert "calibrated on 2 training images" in outcome.out and "no test images" in outcome.out


def test_weights_of_a_file_are_calibrated_by_named_data(digits, tmp_path):
    weights, out = tmp_path / "digits.safetensors", tmp_path / "digits.onnx"
    assert run_script("convert.py", digits, weights).status == 0
    flags = ["--int8", "--calibrate", "digits", "--calibration-images", 50]
    outcome = run_script("convert.py", weights, out, *flags)
    assert outcome.status == 0 and "in int8" in outcome.out, outcome.err
