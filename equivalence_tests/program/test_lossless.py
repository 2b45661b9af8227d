"""The study of what networks that were trained on JPEG files make of the lossless images."""

import pytest
from PIL import Image

import flax_resnet
from equivalence_tests.program.insects import train_on
from equivalence_tests.studies import lossless, temperature
from flax_resnet.commands.evaluate import open_data


@pytest.fixture(scope="module")
def copies(folder, tmp_path_factory):
    """Class folders of images as PNG files and as JPEG files, and a run on the JPEG files."""
    root = tmp_path_factory.mktemp("copies")
    for path in sorted((folder / "train").glob("*/*")):
        for suffix in ("png", "jpg"):
            target = root / suffix / path.parent.name / f"{path.stem}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(target, quality=90)
    flags = ("--validation-fraction", 0.3, "--epochs", 2)
    assert train_on(root / "jpg", root / "run", *flags).status == 0
    return root


def test_only_images_outside_the_training_are_measured(copies, tmp_path):
    run = flax_resnet.load_run(copies / "run")
    found = lossless.measure(run, copies / "png", copies / "jpg", tmp_path)
    unseen = open_data(run, None, "validation").validation
    assert found["images"] == len(unseen) > 0
    loss = temperature.loss(*temperature.outputs(run, unseen))
    assert found["jpeg_loss"] == pytest.approx(loss, rel=1e-5)
    left = {path.stem for path in (tmp_path / "lossless").glob("*/*")}
    assert left == {path.stem for path in (tmp_path / "jpeg").glob("*/*")}
    assert found["lossless_loss"] != found["jpeg_loss"]


def test_copies_without_loss_cost_nothing(copies, tmp_path):
    run = flax_resnet.load_run(copies / "run")
    found = lossless.measure(run, copies / "jpg", copies / "jpg", tmp_path)
    assert found["lossless_loss"] == found["jpeg_loss"] and found["p"] == 1
