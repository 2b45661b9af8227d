"""Exported programs compute what the run computes, for any batch size; others are not kept."""

import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from equivalence_tests.parity import inputs
from equivalence_tests.parity.tolerances import relative_error
from equivalence_tests.program.command import refused, run_script
from flax_resnet.interop import export, loaded_run
from flax_resnet.models import create_model, folding
from flax_resnet.weights import convert
from torch_ref import checkpoint

LOOKS = ["--class-names", "a,b,c,d,e,f,g", "--image-size", 32]
LOOKS += ["--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.3, 0.4]
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])

README = (Path(__file__).parents[2] / "docs/convert.md").read_text()

CLOSE = 1e-5
"""Largest relative difference of logits of two float32 programs; test_folding.py is exact."""


@pytest.fixture(scope="module")
def weights() -> dict:
    return inputs.make_case("resnet20").arrays


@pytest.fixture(scope="module")
def run_dir(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder / "weights.pth", weights)
    assert run_script("convert.py", folder / "weights.pth", folder / "run", *LOOKS).status == 0
    return folder / "run"


def images(number: int) -> np.ndarray:
    return inputs.random_numbers(number).integers(0, 256, (number, 32, 32, 3), np.uint8)


def expected(weights, images) -> np.ndarray:
    """Logits of the model without export."""
    model = convert.load_state_dict(create_model("resnet20", 7), weights)
    model.eval()
    return np.asarray(model(jnp.asarray((images / 255 - MEAN) / STD, jnp.float32)))


def run_stablehlo(path: Path):
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def run_onnx(path: Path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def program(images):
        normalized = ((images / 255 - MEAN) / STD).astype(np.float32)
        return session.run(None, {"images": normalized.transpose(0, 3, 1, 2)})[0]

    return program


PROGRAMS = {".stablehlo": run_stablehlo, ".onnx": run_onnx}


@pytest.fixture(scope="module")
def programs(run_dir, tmp_path_factory) -> dict[str, Path]:
    """Both kinds of exported programs of the run, without and with folding."""
    folder = tmp_path_factory.mktemp("programs")
    for name, flags in (("plain", []), ("folded", ["--fold-batchnorm"])):
        for suffix in PROGRAMS:
            outcome = run_script("convert.py", run_dir, folder / (name + suffix), *flags)
            assert outcome.status == 0, outcome.err
    return {path.name: path for path in folder.iterdir()}


def test_programs_compute_what_the_run_does(programs, weights):
    assert len(programs) == 4
    for path in programs.values():
        program = PROGRAMS[path.suffix](path)
        for number in (1, 2, 5):
            got = program(images(number))
            assert got.dtype == np.float32
            assert relative_error(got, expected(weights, images(number))) < CLOSE, path


def test_a_program_can_be_made_of_a_file_of_weights(run_dir, weights, tmp_path):
    source, out = run_dir.parent / "weights.pth", tmp_path / "net.stablehlo"
    assert run_script("convert.py", source, out, *LOOKS[2:]).status == 0
    assert relative_error(run_stablehlo(out)(images(2)), expected(weights, images(2))) < CLOSE


def test_stablehlo_is_for_every_platform_and_any_batch(programs):
    exported = jax.export.deserialize(bytearray(programs["plain.stablehlo"].read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (shape,) = exported.in_avals
    assert str(shape.shape) == "(batch, 32, 32, 3)" and shape.dtype == np.uint8


def test_onnx_says_what_it_takes_and_keeps_no_path(programs):
    model = onnx.load(programs["plain.onnx"])
    onnx.checker.check_model(model, full_check=True)
    (entry,) = model.graph.input
    sizes = [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, 32, 32]
    notes = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert notes["class_names"] == list("abcdefg") and notes["mean"] == [0.5, 0.4, 0.3]
    assert notes["resize_size"] == notes["image_size"] == 32
    assert notes["interpolation"] == "bilinear" and not notes["exif_transpose"]
    content = programs["plain.onnx"].read_bytes()
    assert b"site-packages" not in content and str(Path.cwd()).encode() not in content


def test_the_snippet_of_the_readme_runs_as_it_is(programs, weights, tmp_path, monkeypatch):
    for suffix in PROGRAMS:
        (tmp_path / f"birds{suffix}").symlink_to(programs[f"plain{suffix}"])
    monkeypatch.chdir(tmp_path)
    (code,) = [c for c in README.split("```python\n") if "birds.stablehlo" in c.split("```")[0]][
        -1:
    ]
    names = {}
    exec(code.split("```")[0], names)
    for logits in (names["logits"], names["onnx_logits"]):
        assert relative_error(logits, expected(weights, names["images"])) < CLOSE


class SlowToFold:
    """A network whose constant folding takes the compiler over a second, which it warns about."""

    image_shape = (1,)

    @staticmethod
    def logits(images):
        weights = jnp.asarray(np.random.default_rng(0).normal(size=(1, 500, 500, 1)), jnp.float32)
        window = ((1, 21, 21, 1), (1, 1, 1, 1), "SAME")
        return images + jax.lax.reduce_window(weights, 0.0, jax.lax.add, *window).mean()


def test_an_export_is_compared_without_a_word_of_the_compiler(tmp_path, capfd):
    images = np.zeros((2, 1), np.uint8)
    own = export._logits(SlowToFold, images)
    exported = jax.export.export(jax.jit(SlowToFold.logits))(images)
    (tmp_path / "a.stablehlo").write_bytes(exported.serialize())
    program = export._load_stablehlo(tmp_path / "a.stablehlo")
    assert np.allclose(program(images), own)
    assert capfd.readouterr().err == ""


def test_evaluate_and_predict_fold_too(run_dir, tmp_path):
    """Folding keeps the figures; a wrong folding changes them."""
    for split in ("train", "val", "test"):
        for number, name in enumerate("abcdefg"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(images(number + 1)[0]).save(tmp_path / split / name / "0.png")

    def figures(*flags):
        data, out = ["--dataset", f"folder:{tmp_path}"], tmp_path / "out.json"
        evaluated = run_script("evaluate.py", run_dir, *data, "--json", out, *flags)
        assert evaluated.status == 0, evaluated.err
        loss = json.loads(out.read_text())["loss"]
        predicted = run_script("predict.py", run_dir, tmp_path / "test", "--json", out, *flags)
        assert predicted.status == 0, predicted.err
        rows = json.loads(out.read_text())
        return [loss, *(p["probability"] for row in rows for p in row["predictions"])]

    plain = figures()
    assert figures("--fold-batchnorm") == pytest.approx(plain, rel=CLOSE)
    with mock.patch.object(folding, "_fold", wrong_fold):
        assert figures("--fold-batchnorm") != pytest.approx(plain, rel=CLOSE)


@pytest.mark.control
@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_program_that_computes_something_else_is_not_kept(run_dir, tmp_path, suffix):
    """The faults are Keras's eps in the folding, and one weight a hundredth off."""
    out, flags = tmp_path / f"net{suffix}", []
    if suffix == ".stablehlo":
        flags = ["--fold-batchnorm"]
        fault = mock.patch.object(folding, "_fold", wrong_fold)
    else:
        fault = mock.patch.object(checkpoint, "to_tensors", wrong_tensors(checkpoint.to_tensors))
    with fault:
        outcome = run_script("convert.py", run_dir, out, *flags)
    assert outcome.status == 1 and "its logits" in outcome.err, outcome
    assert not list(tmp_path.iterdir())


def wrong_fold(convolution, norm, original=folding._fold):
    norm.epsilon = 1e-3
    original(convolution, norm)


def wrong_tensors(original):
    def convert(arrays):
        return original(arrays | {"conv1.weight": arrays["conv1.weight"] * 1.01})

    return convert


def test_the_comparison_sees_a_fault_at_the_second_batch_size(run_dir, tmp_path):
    run = loaded_run.load_run(run_dir)

    def load(path):
        return lambda images: run.logits(images) if len(images) == 1 else run.logits(images) * 1.01

    with pytest.raises(export.DamagedExport, match="3 images"):
        export.write_program(tmp_path / "net", run, lambda path: path.touch(), load)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(run_dir, tmp_path, monkeypatch):
    for module in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "torch_ref.onnx_file", raising=False)
        monkeypatch.delattr(sys.modules["torch_ref"], "onnx_file", raising=False)
        outcome = run_script("convert.py", run_dir, tmp_path / "net.onnx")
        refused(outcome, module, "pip install '.[export]'", "uv run --extra export")
        monkeypatch.undo()
    assert not list(tmp_path.iterdir())
