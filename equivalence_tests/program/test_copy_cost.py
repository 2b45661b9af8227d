"""The pairs of lossless images and JPEG files of `equivalence_tests/studies/copy_cost.py`."""

import numpy as np
import pytest
from PIL import Image

from equivalence_tests.studies import copy_cost, reencoded

IMAGES = 6


@pytest.fixture
def copies(tmp_path):
    """Two classes of PNG files, and the JPEG files of the same images under other names."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for kind in ("png", "jpg"):
            (tmp_path / kind / name).mkdir(parents=True)
        for number in range(IMAGES):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((32, 32))
            image.save(tmp_path / "png" / name / f"{number}.png")
            image.save(tmp_path / "jpg" / name / f"{IMAGES - number}.jpg", quality=75)
    return tmp_path


def test_a_pair_is_the_same_image(copies, tmp_path):
    levels = copy_cost.copy_pairs(copies / "png", copies / "jpg", tmp_path / "pairs")
    assert len(levels) == 2 * IMAGES and 0 < max(levels) < 20
    for name in ("cat", "dog"):
        for number in range(IMAGES):
            path = tmp_path / "pairs" / "jpeg" / name / f"{number}.jpg"
            assert (
                path.read_bytes() == (copies / "jpg" / name / f"{IMAGES - number}.jpg").read_bytes()
            )
            assert (tmp_path / "pairs" / "lossless" / name / f"{number}.png").exists()


def test_a_copy_belongs_to_one_image(copies, tmp_path):
    left = copies / "png" / "cat"
    (left / "twin.png").write_bytes((left / "0.png").read_bytes())
    with pytest.raises(ValueError, match="same nearest copy"):
        copy_cost.copy_pairs(copies / "png", copies / "jpg", tmp_path / "pairs")


def _predictions(path, kind, suffix, predicted):
    lines = [f"{kind}/{label}/{n}.{suffix},{label},{p}" for (label, n), p in predicted.items()]
    path.write_text("\n".join(["path,label,prediction", *lines]) + "\n")
    return path


def _folds(*accuracies):
    return {"alone": [{"accuracy": accuracy} for accuracy in accuracies]}


def test_the_cost_is_that_of_the_same_folds_and_seeds():
    """Folds and seeds of the two sets are pairs, however much they differ among each other."""
    seeds = [
        {"lossless": _folds(0.5, 0.9), "jpeg": _folds(0.49, 0.88)},
        {"lossless": _folds(0.1, 0.7), "jpeg": _folds(0.07, 0.68)},
    ]
    found = copy_cost.cost(seeds)
    assert found["accuracy_lost"] == pytest.approx(0.02)
    assert found["error"] == pytest.approx(np.std([0.01, 0.02, 0.03, 0.02], ddof=1) / 2)
    assert found["p"] < 0.02
    swapped = [{"lossless": found["jpeg"], "jpeg": found["lossless"]} for found in seeds]
    assert copy_cost.cost(swapped)["accuracy_lost"] == pytest.approx(-0.02)


def test_the_same_images_are_compared(tmp_path):
    images = [("cat", number) for number in range(8)] + [("dog", 0)]
    exact = dict.fromkeys(images, "cat")  # right but for the dog
    copy = exact | {("cat", number): "dog" for number in range(6)} | {("dog", 0): "dog"}
    lossless = _predictions(tmp_path / "a.csv", "lossless", "png", exact)
    jpeg = _predictions(tmp_path / "b.csv", "jpeg", "jpg", copy)
    found = copy_cost.paired(lossless, jpeg)
    assert (found["right_in_lossless_alone"], found["right_in_jpeg_alone"]) == (6, 1)
    assert found["p"] == pytest.approx(2 * (1 + 7) / 2**7)  # of 7 images, 0 or 1 and 6 or 7
    assert copy_cost.paired(jpeg, jpeg)["p"] == 1
    other = _predictions(tmp_path / "c.csv", "jpeg", "jpg", {("cat", 0): "cat"})
    with pytest.raises(ValueError, match="the same images"):
        copy_cost.paired(lossless, other)


def test_a_lower_quality_changes_the_same_images_more(copies, tmp_path_factory):
    levels = []
    for quality in (90, 30):
        target = tmp_path_factory.mktemp("reencoded")
        levels.append(reencoded.reencode(copies, target, quality))
        names = [{path.relative_to(root).with_suffix("") for path in root.glob("*/*/*")}
                 for root in (copies, target)]  # fmt: skip
        assert names[0] == names[1] and len(names[0]) == 4 * IMAGES
    assert 0 < levels[0] < levels[1]
