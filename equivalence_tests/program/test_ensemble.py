"""Several runs that average what they predict."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from equivalence_tests.program.command import refused, run_script
from equivalence_tests.program.insects import train_on
from flax_resnet.errors import InputError
from flax_resnet.interop.ensemble import ensemble
from flax_resnet.interop.loaded_run import load_run


@pytest.fixture(scope="module")
def other(folder, tmp_path_factory):
    """A run on the same images with other weights."""
    run_dir = tmp_path_factory.mktemp("other") / "insects"
    assert train_on(folder, run_dir, "--epochs", 1, "--seed", 1).status == 0
    return run_dir


@pytest.fixture(scope="module")
def runs(insects, other):
    return {"first": load_run(insects), "second": load_run(other)}


@pytest.fixture(scope="module")
def images(runs):
    shape = (5, *runs["first"].image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_probabilities_are_averaged(runs, images):
    expected = np.mean([run.predict(images) for run in runs.values()], axis=0)
    np.testing.assert_allclose(ensemble(runs).predict(images), expected, atol=1e-6)


def test_logits_are_averaged(runs, images):
    expected = softmax(np.mean([run.logits(images) for run in runs.values()], axis=0), axis=-1)
    np.testing.assert_allclose(ensemble(runs, "logits").predict(images), expected, atol=1e-6)


def test_each_run_normalises_by_its_own_statistics(runs, images):
    darker = replace(runs["second"].config.data, mean=(0.1,) * 3, std=(0.9,) * 3)
    config = replace(runs["second"].config, data=darker)
    both = {"first": runs["first"], "second": replace(runs["second"], config=config)}
    expected = np.mean([run.predict(images) for run in both.values()], axis=0)
    np.testing.assert_allclose(ensemble(both).predict(images), expected, atol=1e-6)


@pytest.mark.parametrize(
    "use",
    [lambda e, _: e.model, lambda e, _: e.without_batchnorm(), lambda e, x: e.features(x)],
    ids=["model", "without_batchnorm", "features"],
)
def test_what_an_ensemble_lacks_is_said(runs, images, use):
    with pytest.raises(InputError, match="an ensemble has no `model`"):
        use(ensemble(runs), images)


def test_classes_in_another_order_are_matched_by_name(runs, images):
    swapped = replace(runs["second"], class_names=runs["second"].class_names[::-1])
    first, second = runs["first"].predict(images), swapped.predict(images)[:, ::-1]
    found = ensemble({"first": runs["first"], "second": swapped}).predict(images)
    np.testing.assert_allclose(found, (first + second) / 2, atol=1e-6)


def test_runs_that_do_not_fit_are_refused_by_name(runs):
    renamed = replace(runs["second"], class_names=("ant", "wasp"))
    with pytest.raises(InputError, match="second has the classes ant, wasp, first has ant, bee"):
        ensemble({"first": runs["first"], "second": renamed})
    data = replace(runs["second"].config.data, image_size=32, resize_size=32)
    larger = replace(runs["second"], config=replace(runs["second"].config, data=data))
    with pytest.raises(InputError, match="second takes images of size 32, first of 12"):
        ensemble({"first": runs["first"], "second": larger})
    with pytest.raises(InputError, match="`average` is probabilities, logits, got 'votes'"):
        ensemble(runs, "votes")


def test_runs_that_turn_images_otherwise_do_not_share_them(runs):
    data = replace(runs["second"].config.data, exif_transpose=True)
    turning = replace(runs["second"], config=replace(runs["second"].config, data=data))
    with pytest.raises(InputError, match="second takes images of exif_transpose True, first of F"):
        ensemble({"first": runs["first"], "second": turning})


def test_classes_of_one_name_keep_their_order(runs, images):
    """Two classes of ImageNet are called crane."""
    expected = np.mean([run.predict(images) for run in runs.values()], axis=0)
    cranes = {name: replace(run, class_names=("crane", "crane")) for name, run in runs.items()}
    np.testing.assert_allclose(ensemble(cranes).predict(images), expected, atol=1e-6)


@pytest.mark.parametrize("wrong", [{}, [], None])
def test_no_runs_are_no_ensemble(wrong):
    with pytest.raises(InputError, match="`runs` is a dict of names and loaded runs"):
        ensemble(wrong)


def test_evaluate_tells_what_each_run_reaches_alone(insects, other, tmp_path):
    alone, together, rows = (tmp_path / name for name in ("alone.json", "all.json", "rows.csv"))
    outcome = run_script("evaluate.py", other, "--json", alone)
    assert outcome.status == 0, outcome.err
    outcome = run_script("evaluate.py", insects, other, "--json", together, "--predictions", rows)
    assert outcome.status == 0 and "ensemble" in outcome.out, outcome.err
    found, single = json.loads(together.read_text()), json.loads(alone.read_text())
    assert found["members"][str(other)]["loss"] == pytest.approx(single["loss"], abs=1e-6)
    assert list(found["members"]) == [str(insects), str(other)] and found["images"] == 24
    with rows.open() as file:
        right = [row["label"] == row["prediction"] for row in csv.DictReader(file)]
    assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-12)


def test_evaluate_names_the_run_with_other_classes(insects, folder, tmp_path):
    for split, name in (("train", "ant"), ("train", "wasp"), ("test", "ant"), ("test", "wasp")):
        source = folder / split / name.replace("wasp", "bee")
        shutil.copytree(source, tmp_path / "wasps" / split / name)
    wasps = tmp_path / "run"
    assert train_on(tmp_path / "wasps", wasps, "--epochs", 1).status == 0
    outcome = run_script("evaluate.py", insects, wasps)
    refused(outcome, f"{wasps} has the classes ant, wasp, {insects} has ant, bee")
    outcome = run_script("evaluate.py", insects, wasps, "--dataset", f"folder:{folder}")
    refused(outcome, f"has the classes ant, bee; {wasps} was trained on ant, wasp")


def test_predict_takes_runs_and_then_images(insects, other, folder, tmp_path):
    out, bees = tmp_path / "out.json", folder / "test" / "bee"
    outcome = run_script("predict.py", insects, other, bees, "--json", out)
    assert outcome.status == 0, outcome.err
    rows = json.loads(out.read_text())
    runs = [load_run(path) for path in (insects, other)]
    expected = np.mean([run.predict([row["image"] for row in rows]) for run in runs], axis=0)
    found = [{p["class"]: p["probability"] for p in row["predictions"]} for row in rows]
    found = [[row[name] for name in runs[0].class_names] for row in found]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    refused(run_script("predict.py", insects, other), "no image or folder follows")


def test_members_of_two_types_give_the_same_in_any_order(insects, folder, tmp_path):
    assert train_on(folder, tmp_path / "wide", "--epochs", 1, "--dtype", "float64").status == 0
    losses = []
    for order in ([insects, tmp_path / "wide"], [tmp_path / "wide", insects]):
        outcome = run_script("evaluate.py", *order, "--json", tmp_path / "all.json")
        assert outcome.status == 0, outcome.err
        losses.append(json.loads((tmp_path / "all.json").read_text())["members"])
    assert losses[0] == losses[1]
    assert run_script("evaluate.py", tmp_path / "wide", "--json", tmp_path / "one.json").status == 0
    alone = json.loads((tmp_path / "one.json").read_text())["loss"]
    assert losses[0][str(tmp_path / "wide")]["loss"] == pytest.approx(alone, abs=1e-12)


def test_runs_share_the_images_that_both_leave_out(insects, folder, tmp_path):
    """However each of them divides the others."""
    flags = ["--epochs", 1, "--split-seed", 7]
    assert train_on(folder, tmp_path / "run", *flags).status == 0
    both = [insects, tmp_path / "run"]
    assert run_script("evaluate.py", *both).status == 0
    for split in ("validation", "all"):
        refused(run_script("evaluate.py", *both, "--split", split), "divides its data otherwise")


def test_the_loss_of_an_ensemble_is_that_of_the_mean_probability(runs, images):
    labels = np.array([0, 1, 0, 1, 0])
    logits = ensemble(runs).logits(images)
    mean = np.mean([run.predict(images) for run in runs.values()], axis=0)
    rows = np.arange(len(labels))
    losses = -log_softmax(np.asarray(logits), axis=-1)[rows, labels]
    np.testing.assert_allclose(losses, -np.log(mean[rows, labels]), atol=1e-6)
