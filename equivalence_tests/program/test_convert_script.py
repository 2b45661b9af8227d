"""`scripts/convert.py`: every pair of formats, every kind of bad file, real trained weights."""

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

import torch_ref
from equivalence_tests.parity import inputs
from equivalence_tests.program.command import refused, run_script, train
from flax_resnet.interop import export, loaded_run, training_state
from flax_resnet.models import create_model
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.training import restore
from flax_resnet.weights import convert
from torch_ref import checkpoint

NAMES = "a,b,c,d,e,f,g"
LOOKS = ["--class-names", NAMES, "--image-size", 32, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 1]


@pytest.fixture(scope="module")
def weights() -> dict:
    return inputs.make_case("resnet20").arrays


@pytest.fixture(scope="module")
def sources(weights, tmp_path_factory) -> dict[str, Path]:
    """Files of equal weights in every format, written without the command where possible."""
    folder = tmp_path_factory.mktemp("sources")
    for suffix in (".pth", ".pt", ".th"):
        torch.save(checkpoint.to_tensors(weights), folder / f"weights{suffix}")
    save_file(weights, folder / "weights.safetensors")
    outcome = run_script("convert.py", folder / "weights.pth", folder / "run", *LOOKS)
    assert outcome.status == 0, outcome.err
    return {path.suffix or "run": path for path in folder.iterdir()}


def read(path: Path) -> dict:
    if path.is_dir():
        return restore.load_weights(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    return {n: t.numpy() for n, t in torch.load(path, weights_only=True).items()}


def same(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(
        (got[n].dtype, got[n].shape) == (expected[n].dtype, expected[n].shape)
        and got[n].tobytes() == expected[n].tobytes()
        for n in expected
    )


@pytest.mark.parametrize("target", [".safetensors", ".pth", ".pt", ""])
@pytest.mark.parametrize("source", [".safetensors", ".pth", ".th", "run"])
def test_every_pair_of_formats_keeps_every_bit(sources, weights, source, target, tmp_path):
    out = tmp_path / f"out{target}"
    looks = LOOKS if source != "run" and not target else []
    outcome = run_script("convert.py", sources[source], out, *looks)
    assert outcome.status == 0, outcome.err
    assert same(read(out), weights)
    if target.startswith(".p"):
        assert list(read(out)) == list(weights)
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "any").touch()
    assert target == "" or out.stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_same_weights_give_the_same_bytes(sources, tmp_path, suffix):
    written = set()
    for number, source in enumerate((".pth", ".safetensors", "run")):
        out = tmp_path / f"name{number}{suffix}"
        assert run_script("convert.py", sources[source], out).status == 0
        written.add(out.read_bytes())
    assert len(written) == 1
    if suffix == ".safetensors":
        with safe_open(out, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_run_directory_says_what_it_was_told(sources, weights):
    run = loaded_run.load_run(sources["run"])
    assert run.class_names == tuple(NAMES.split(",")) and run.channels == 3
    assert run.config.model.arch == "resnet20" and run.config.data.image_size == 32
    assert run.preprocess.mean == (0.5, 0.4, 0.3) and run.preprocess.std == (0.2, 0.2, 1.0)
    refused(run_script("evaluate.py", sources["run"]), "no such folder")
    assert "finished" in run_script("train.py", "--resume", "--run-dir", sources["run"]).out


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Code.place),)


def without(weights, name):
    return {n: a for n, a in weights.items() if n != name}


BAD_WEIGHTS = {
    "a missing key": (lambda w: without(w, "bn1.bias"), "missing bn1.bias"),
    "an extra key": (lambda w: w | {"layer9.bias": np.ones(3)}, "unexpected layer9.bias"),
    "another shape": (
        lambda w: w | {"layer1.0.bn1.bias": np.ones(5, np.float32)},
        "layer1.0.bn1.bias has shape (5,) instead of (16,)",
    ),
    "NaN": (
        lambda w: w | {"fc.bias": np.full(7, np.nan, np.float32)},
        "fc.bias has non-finite values",
    ),
    "integers": (lambda w: w | {"fc.bias": np.ones(7, np.int8)}, "fc.bias has type int8"),
    "a name twice": (lambda w: w | {"linear.bias": w["fc.bias"]}, "linear.bias"),
}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_do_not_fit_are_named(weights, tmp_path, fault, suffix):
    change, words = BAD_WEIGHTS[fault]
    source = tmp_path / f"bad{suffix}"
    save = checkpoint.save if suffix == ".pth" else lambda path, arrays: save_file(arrays, path)
    save(source, change(weights))
    outcome = run_script("convert.py", source, tmp_path / "out.safetensors")
    twice = "twice" if "twice" in fault else "nearest architecture is resnet20 (7 classes"
    refused(outcome, words, twice)
    assert list(tmp_path.iterdir()) == [source]


def test_weights_of_another_architecture(sources, tmp_path):
    words = ("--arch", "resnet32"), ("--arch", "basic_cnn"), ("--arch", "resnet18")
    for arguments in words:
        outcome = run_script("convert.py", sources[".pth"], tmp_path / "out.pth", *arguments)
        nearest = "the nearest architecture is resnet20 (7 classes, 3 channels), which has these"
        refused(outcome, "missing", nearest)
    refused(
        run_script("convert.py", sources[".pth"], tmp_path / "out.pth", "--arch", "resnet21"),
        "resnet21",
    )
    assert not list(tmp_path.iterdir())


def cut(path: Path, source: Path):
    path.write_bytes(source.read_bytes()[:-1000])


def flip_header(path: Path, source: Path):
    content = bytearray(source.read_bytes())
    content[3:60] = bytes(57)
    path.write_bytes(content)


DAMAGES = {
    "cut off": cut,
    "overwritten": flip_header,
    "empty": lambda path, source: path.write_bytes(b""),
    "a text": lambda path, source: path.write_text("weights"),
    "a folder": lambda path, source: path.mkdir(),
    "not there": lambda path, source: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused_by_name(sources, tmp_path, damage, suffix):
    source = tmp_path / f"bad{suffix}"
    DAMAGES[damage](source, sources[suffix])
    refused(run_script("convert.py", source, tmp_path / "out.safetensors"), f"bad{suffix}")
    assert set(tmp_path.iterdir()) <= {source}


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path):
    Code.place = tmp_path / "executed"
    for content in (Code(), {"state_dict": {"fc.bias": Code()}}):
        torch.save(content, tmp_path / "bad.pth")
        outcome = run_script("convert.py", tmp_path / "bad.pth", tmp_path / "out.pth")
        refused(outcome, "bad.pth", "code")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]
    torch.load(tmp_path / "bad.pth", weights_only=False)  # the control: it would have run
    assert Code.place.exists()


def test_tensors_that_numpy_does_not_have(tmp_path):
    torch.save({"fc.bias": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "bad.pth")
    refused(run_script("convert.py", tmp_path / "bad.pth", tmp_path / "out.pth"), "bad.pth")


def test_a_run_is_not_replaced_by_what_is_converted_from_it(tmp_path):
    (tmp_path / "a.pth").touch()
    outcome = run_script("convert.py", tmp_path / "a.pth", tmp_path / "a.pth", "--overwrite")
    refused(outcome, "IN and OUT are the same")


WRONG_WORDS = [
    (["out.tflite"], [".tflite", ".safetensors", "run directory"]),
    (["out.onnx"], ["--dataset", "--image-size", "--mean"]),
    (["out.stablehlo", "--fold-batchnorm"], ["--dataset", "--image-size", "--mean"]),
    (["out.pth", "--fold-batchnorm"], ["--fold-batchnorm", ".stablehlo", ".onnx"]),
    (["none/out.pth"], ["none", "does not exist"]),
    (["kept.pth"], ["kept.pth", "--overwrite"]),
    (["kept"], ["no run"]),
    (["kept", "--overwrite"], ["no run"]),
    (["out", "--class-names", "a,b"], ["--image-size", "--mean", "--std"]),
    (["out", *LOOKS, "--class-names", "a,b"], ["2 names", "7"]),
    (["out", *LOOKS, "--class-names", "gone.txt"], ["gone.txt", "no such file"]),
    (["out", *LOOKS, "--class-names", ",".join("n" * 300)], ["300 names", "7"]),
    (["out", *LOOKS, "--mean", 0.5, "--std", 0.5], ["--mean", "3 values"]),
    (["out.pth", "--stem", "imagenet"], ["own stem"]),
    (
        ["out", "--dataset", "digits"],
        ["7 classes", "digits has 10", "scripts/train.py --arch resnet20", "--init-from"],
    ),
    (["out", "--dataset", "folder:gone"], ["gone"]),
    (["out.safetensors", "--mean", 1, 1, 1], ["--mean", ".safetensors"]),
    (["out.pth", "--class-names", NAMES], ["--class-names", ".pth"]),
    (["out.pth", "--config", "c.json"], ["--config", ".pth"]),
    (["out.pt", "--training", "--arch", "resnet20"], ["--arch", ".pt"]),
    (["out.pt", "--training"], ["--training", "run directory"]),
    (["out.pt", "--training", "--ema"], ["--ema", "--training"]),
    (["out.pth", "--shortcut", "projection"], ["missing layer2.0.downsample"]),
    (["out.pth", "--weights-key", "net"], ["--weights-key", "'net'"]),
    (["out", "--clas-names", "a"], ["--class-names"]),
]


def test_the_help_names_no_output_that_is_none():
    outcome = run_script("convert.py", "--help")
    assert outcome.status == 0 and "or none" not in outcome.out
    assert "a name without a suffix is a run directory" in " ".join(outcome.out.split())


@pytest.mark.parametrize("arguments,words", WRONG_WORDS, ids=lambda x: " ".join(map(str, x))[:30])
def test_wrong_words_are_one_line_and_leave_nothing(sources, tmp_path, arguments, words):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept.pth").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    out, *rest = arguments
    refused(run_script("convert.py", sources[".pth"], tmp_path / out, *rest), *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "kept.pth").read_text() == "precious"


def test_a_run_converted_to_a_run_keeps_what_no_flag_changes(sources, weights, tmp_path):
    flags = ["--mean", 0.1, 0.1, 0.1, "--std", 1, 1, 1]
    assert run_script("convert.py", sources["run"], tmp_path / "run", *flags).status == 0
    old, new = loaded_run.load_run(sources["run"]), loaded_run.load_run(tmp_path / "run")
    assert same(read(tmp_path / "run"), weights) and new.preprocess.mean == (0.1, 0.1, 0.1)
    assert new.class_names == old.class_names and new.config.model == old.config.model


@pytest.mark.parametrize("name", ["a.safetensors", "checkpoints/a.pth", "inner"])
def test_nothing_is_written_into_the_run_that_is_converted(sources, tmp_path, name):
    (tmp_path / "link").symlink_to(sources["run"])
    for place in (sources["run"], tmp_path / "link"):
        outcome = run_script("convert.py", sources["run"], place / name)
        refused(outcome, "lies in the run", "which stays as it is")
        assert not (place / name).exists()


def test_overwrite_replaces_files_and_runs(sources, weights, tmp_path):
    for name, looks in (("out.pth", []), ("run", LOOKS)):
        for overwrite in ([], ["--overwrite"]):
            outcome = run_script("convert.py", sources[".th"], tmp_path / name, *looks, *overwrite)
            assert outcome.status == 0, outcome.err
        assert same(read(tmp_path / name), weights)


def test_what_reads_back_different_is_not_kept(sources, tmp_path):
    def wrong(path):
        return {name: array + array.dtype.type(1) for name, array in load_file(path).items()}

    with mock.patch.object(export, "load_file", wrong):
        outcome = run_script("convert.py", sources[".pth"], tmp_path / "out.safetensors")
    assert outcome.status == 1 and "conv1.weight" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_widths_keep_their_values(weights, tmp_path, dtype):
    narrow = {n: a.astype(dtype) if a.ndim else a for n, a in weights.items()}
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = {n: a.astype(wide) if a.ndim else a for n, a in narrow.items()}
    tensors = {n: torch.from_numpy(a.astype(wide) if a.ndim else a) for n, a in narrow.items()}
    kind = getattr(torch, np.dtype(dtype).name)
    torch.save({n: t.to(kind) if t.ndim else t for n, t in tensors.items()}, tmp_path / "a.pth")
    save_file(narrow, tmp_path / "a.safetensors")
    for source, out in (("a.pth", "b.safetensors"), ("a.safetensors", "b.pth"), ("a.pth", "b")):
        looks = [] if "." in out else LOOKS
        outcome = run_script("convert.py", tmp_path / source, tmp_path / out, *looks)
        assert outcome.status == 0, outcome.err
        assert same(read(tmp_path / out), expected)


def test_tensors_that_are_not_contiguous(weights, tmp_path):
    tensors = checkpoint.to_tensors(weights)
    odd = {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in tensors.items()}
    assert not odd["conv1.weight"].is_contiguous()
    torch.save(odd, tmp_path / "odd.pth")
    assert run_script("convert.py", tmp_path / "odd.pth", tmp_path / "a.safetensors").status == 0
    assert same(read(tmp_path / "a.safetensors"), weights)
    arrays = {name: tensor.numpy() for name, tensor in odd.items()}
    export.write_safetensors(tmp_path / "b.safetensors", arrays)
    assert same(read(tmp_path / "b.safetensors"), weights)
    save_file(arrays, tmp_path / "control.safetensors")  # which is why it is made contiguous
    assert not same(read(tmp_path / "control.safetensors"), weights)


def test_without_torch_the_extra_is_named(sources, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("torch_ref")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(run_script("convert.py", sources[".pth"], tmp_path / "out.pth"), "--extra torch")
    safe = run_script("convert.py", sources[".safetensors"], tmp_path / "out.safetensors")
    assert safe.status == 0, safe.err


def last_state(run_dir: Path) -> dict:
    """Weights, optimizer, moving average and step of the newest checkpoint."""
    _, config, _, state = restore.restore(run_dir, Checkpoints.latest)
    return training_state.flat(training_state.training_arrays(state, config.optimizer))


def test_a_training_crosses_to_torch_and_back_and_goes_on_to_the_same_bits(tmp_path):
    """A run cut off after one epoch, converted to PyTorch and back, ends as the whole run."""
    rule = ["--ema-decay", 0.9, "--schedule", "cosine"]
    assert train(tmp_path / "whole", *rule).status == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    newest = max((tmp_path / "half/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    there = run_script("convert.py", tmp_path / "half", tmp_path / "half.pt", "--training")
    assert there.status == 0, there.err
    content = torch.load(tmp_path / "half.pt", weights_only=True)
    assert content["step"] == int(newest.name) // 2 == content["ema"]["n_averaged"]
    config = ["--config", tmp_path / "half/config.json"]
    back = run_script("convert.py", tmp_path / "half.pt", tmp_path / "run", "--training", *config)
    assert back.status == 0, back.err
    outcome = run_script("train.py", "--resume", "--run-dir", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    # Files of another optimizer, and of a schedule that keeps a state.
    plateau = json.loads((tmp_path / "half/config.json").read_text())
    plateau["schedule"]["schedule"] = "plateau"
    (tmp_path / "plateau.json").write_text(json.dumps(plateau))
    refused(
        run_script(
            "convert.py", tmp_path / "half.pt", tmp_path / "no", "--training",
            "--config", tmp_path / "plateau.json",
        ),
        "plateau",
    )  # fmt: skip
    other = json.loads((tmp_path / "half/config.json").read_text())
    other["optimizer"] |= {"optimizer": "sgd", "ema_decay": 0.0}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused(
        run_script(
            "convert.py", tmp_path / "half.pt", tmp_path / "no", "--training",
            "--config", tmp_path / "other.json",
        ),
        "half.pt",
    )  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_the_training_of_a_head_crosses_and_a_finished_one_does_not_come_back(tmp_path):
    run, config = tmp_path / "run", tmp_path / "config.json"
    fresh = convert.state_dict(create_model("basic_cnn", in_channels=1))
    export.write_safetensors(tmp_path / "fresh.safetensors", fresh)
    flags = ["--init-from", tmp_path / "fresh.safetensors", "--freeze-backbone"]
    assert train(run, *flags, "--epochs", 1, "--ema-decay", 0.9).status == 0
    there = run_script("convert.py", run, tmp_path / "head.pt", "--training")
    assert there.status == 0, there.err
    back = ["convert.py", tmp_path / "head.pt", tmp_path / "back", "--training", "--config", config]
    values = json.loads((run / "config.json").read_text())
    config.write_text(json.dumps(values))
    refused(run_script(*back), "head.pt", "all 1 epochs", "nothing is left")
    assert not (tmp_path / "back").exists()
    config.write_text(json.dumps(values | {"epochs": 2}))
    outcome = run_script(*back)
    assert outcome.status == 0, outcome.err
    assert same(last_state(tmp_path / "back"), last_state(run))


def test_converted_weights_evaluate_as_the_run_and_fine_tune(tmp_path):
    assert train(tmp_path / "run").status == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    for source, out, rest in (
        ("run", "weights.pth", []),
        ("weights.pth", "again", ["--config", tmp_path / "run/config.json"]),
    ):
        outcome = run_script("convert.py", tmp_path / source, tmp_path / out, *rest)
        assert outcome.status == 0, outcome.err
    figures = tmp_path / "figures.json"
    assert run_script("evaluate.py", tmp_path / "again", "--json", figures).status == 0
    for name, value in report["splits"]["test"].items():
        assert json.loads(figures.read_text())[name] == pytest.approx(value, abs=1e-6)
    tuned = train(tmp_path / "tuned", "--smoke", "--init-from", tmp_path / "again", "--lr", 1e-9)
    assert tuned.status == 0, tuned.err
    near, start = read(tmp_path / "tuned"), read(tmp_path / "again")
    assert all(np.allclose(near[n], start[n], atol=1e-6) for n in start)


CHECKPOINTS = Path(__file__).parents[2].parent / "shared/data/checkpoints"
IMAGENET = ["--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225]


@pytest.mark.slow
@pytest.mark.parametrize("arch, accuracy", [("resnet20", 0.8103), ("resnet32", 0.8256)])
def test_trained_checkpoints_score_what_they_scored(arch, accuracy, tmp_path):
    """Predictions equal torch's; accuracies equal those of the checkpoints' own project."""
    found = sorted(CHECKPOINTS.glob(f"{arch}-*.th"))
    if not (found and inputs.CIFAR10):
        pytest.skip("needs shared/data beside the repository and CIFAR10_IMAGES")
    looks = ["--dataset", f"folder:{inputs.CIFAR10}", *IMAGENET]
    converted = run_script("convert.py", found[0], tmp_path / "run", *looks)
    assert converted.status == 0, converted.err
    evaluated = run_script("evaluate.py", tmp_path / "run", "--json", tmp_path / "figures.json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads((tmp_path / "figures.json").read_text())["accuracy"] == accuracy
    paths = sorted(Path(inputs.CIFAR10, "test").glob("*/*.jpg"))
    run = loaded_run.load_run(tmp_path / "run")
    ours = np.array([p.argmax() for _, p in loaded_run.predict_files(run, paths)])
    theirs = torch_predictions(arch, found[0], paths)
    assert len(paths) == 10_000 and np.array_equal(ours, theirs)
    labels = [run.class_names.index(path.parent.name) for path in paths]
    assert np.mean(theirs == labels) == pytest.approx(accuracy, abs=1e-9)


@torch.no_grad()
def torch_predictions(arch: str, weights: Path, paths: list[Path]) -> np.ndarray:
    """Classes [N] that PyTorch predicts, with torchvision's loaders and transforms."""
    net = torch_ref.create_model(arch).eval()
    names = checkpoint.load(weights).items()
    tensors = {n.removeprefix("module.").replace("linear.", "fc."): a for n, a in names}
    missing, extra = net.load_state_dict(checkpoint.to_tensors(tensors), strict=False)
    assert not extra and all(name.endswith("num_batches_tracked") for name in missing)
    mean, std = IMAGENET[1:4], IMAGENET[5:]
    steps = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    transform, classes = v2.Compose(steps), []
    for start in range(0, len(paths), 256):
        images = [transform(default_loader(path)) for path in paths[start : start + 256]]
        classes.append(net(torch.stack(images)).argmax(1))
    return torch.cat(classes).numpy()
