"""`scripts/convert.py` makes runs of weights that do not tell everything, and says what it took."""

import errno
import json

import numpy as np
import pytest

from equivalence_tests.parity import inputs
from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.image_folder import fill
from flax_resnet import errors
from flax_resnet.interop import loaded_run
from flax_resnet.training import restore
from flax_resnet.weights.convert import Architecture
from torch_ref import checkpoint

LOOKS = ["--image-size", 8, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 1]
NAMES = ["--class-names", "crow,owl,wren"]


def random_weights(classes=3) -> dict[str, np.ndarray]:
    shapes = Architecture("basic_cnn", classes, 3, None).shapes()
    return inputs.random_state(shapes, inputs.random_numbers())


@pytest.fixture(scope="module")
def weights():
    return {n: a.astype(np.float32) if a.ndim else a for n, a in random_weights().items()}


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    """weights.pth, the run of it, and birds, a folder of images with its classes."""
    folder = tmp_path_factory.mktemp("birds")
    checkpoint.save(folder / "weights.pth", weights)
    for name in ("crow", "owl", "wren"):
        fill(folder / "birds" / name)
    outcome = run_script("convert.py", folder / "weights.pth", folder / "run", *LOOKS, *NAMES)
    assert outcome.status == 0, outcome.err
    return folder


def test_the_classes_of_a_run_are_not_exchanged(folder, tmp_path):
    for names, words in (
        ("wren,owl,crow", ["--class-names", "in the order crow, owl, wren"]),
        ("a,a,b", ["given twice"]),
    ):
        outcome = run_script("convert.py", folder / "run", tmp_path / "a", "--class-names", names)
        refused(outcome, *words)
    for names in ("a,b,c", "crow,owl,wren"):
        place = tmp_path / names
        assert run_script("convert.py", folder / "run", place, "--class-names", names).status == 0
        assert ",".join(loaded_run.load_run(place).class_names) == names


@pytest.mark.parametrize("out", ["a.onnx", "a.stablehlo", "a"])
def test_images_of_other_channels_than_the_weights_are_refused(folder, tmp_path, out):
    for flags, words in (
        (["--grayscale"], "--grayscale makes images of 1 channel, the weights are for 3"),
        (["--mean", 0.5, "--std", 0.5], "--mean and --std need 3 values"),
    ):
        refused(run_script("convert.py", folder / "run", tmp_path / out, *flags), words)
    assert not list(tmp_path.iterdir())


def test_what_the_data_and_not_the_weights_tell_is_said(folder, tmp_path):
    birds = f"folder:{folder / 'birds'}"
    command = ["convert.py", folder / "weights.pth", tmp_path / "run", "--dataset", birds]
    outcome = run_script(*command)
    assert outcome.status == 0
    assert f"--image-size, --mean, --std: those of {birds}" in outcome.out
    outcome = run_script(*command, "--overwrite", "--image-size", 8)
    assert f"--mean, --std: those of {birds}" in outcome.out and "--image-size" not in outcome.out
    outcome = run_script(*command, "--overwrite", *LOOKS, "--interpolation", "bicubic")
    assert "those of" not in outcome.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["interpolation"] == "bicubic"


def test_a_link_leads_to_what_is_written(folder, weights, tmp_path):
    (tmp_path / "old.pth").write_text("old")
    for name in ("old.pth", "new.pth", "new"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(name)
        looks = [] if "." in name else [*LOOKS, *NAMES]
        outcome = run_script("convert.py", folder / "weights.pth", link, *looks, "--overwrite")
        assert outcome.status == 0, outcome.err
        assert link.is_symlink()
        got = restore.load_weights(tmp_path / name)
        assert all(np.array_equal(got[n], weights[n]) for n in weights)


def test_one_wide_array_keeps_its_bits_in_a_run(tmp_path):
    wide = random_weights()
    mixed = {n: a if n.startswith("fc.") or not a.ndim else np.float32(a) for n, a in wide.items()}
    checkpoint.save(tmp_path / "mixed.pth", mixed)
    outcome = run_script("convert.py", tmp_path / "mixed.pth", tmp_path / "run", *LOOKS, *NAMES)
    assert outcome.status == 0, outcome.err
    got = restore.load_weights(tmp_path / "run")
    assert np.array_equal(got["fc.weight"], wide["fc.weight"])


def test_weights_of_one_class_are_refused(tmp_path):
    checkpoint.save(tmp_path / "one.pth", random_weights(classes=1))
    words = [*LOOKS, "--class-names", "ill"]
    outcome = run_script("convert.py", tmp_path / "one.pth", tmp_path / "run", *words)
    refused(outcome, "the weights have one class")


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 2), (errno.EBADF, 1)])
def test_a_full_disk_is_named_where_torch_hides_it(number, status):
    """`torch.save` raises a RuntimeError about positions after the disk's own error."""
    with pytest.raises(RuntimeError) as error:
        try:
            raise OSError(number, "of the disk", "out.pth")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    got, line = errors.verdict(error.value)
    assert got == status
    assert (line == "error: out.pth: of the disk") == (status == 2)
