"""The Python interface, as a notebook uses it."""

import dataclasses
import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from rich.console import Console

import flax_resnet
from flax_resnet.config import DataConfig, ModelConfig, from_dict
from flax_resnet.errors import InputError
from flax_resnet.runs.display import Display
from flax_resnet.training.guard import NonFiniteLoss


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of one short epoch on digits, by the public names alone."""
    config = flax_resnet.TrainConfig(
        epochs=1,
        model=ModelConfig(arch="resnet20"),
        data=DataConfig(train_images=256, eval_images=64, image_size=16),
    )
    run_dir = tmp_path_factory.mktemp("api") / "run"
    report = flax_resnet.fit(config, run_dir, display=Display(Console(quiet=True)))
    assert report["epochs"] == 1
    return run_dir


@pytest.fixture(scope="module")
def run(run_dir):
    return flax_resnet.load_run(run_dir)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1)).astype(np.uint8)


def test_public_names_are_there_and_documented():
    for name in flax_resnet.__all__:
        assert inspect.getdoc(getattr(flax_resnet, name)), name
    assert set(flax_resnet.__all__) == set(dir(flax_resnet))
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        flax_resnet.load_runs  # noqa: B018


def test_predictions_are_probabilities_whatever_the_batch(run):
    whole = run.predict(images(300))  # more than a batch of evaluation
    assert whole.shape == (300, 10) and whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(run.predict(images(300)[:3]), whole[:3], atol=1e-6)
    assert run.predict(images(0)).shape == (0, 10)


def test_a_network_that_gives_nan_predicts_nothing(run):
    """`predict` gives probabilities or raises, for arrays as for files."""
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), run.variables)
    with pytest.raises(NonFiniteLoss, match="no finite probabilities for image 0"):
        dataclasses.replace(run, variables=broken).predict(images(2))


def test_a_file_is_predicted_as_its_pixels(run, tmp_path):
    [pixels] = images(1)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    expected = run.predict(pixels[None])
    for paths in ([tmp_path / "a.png"], tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_allclose(run.predict(paths), expected, atol=1e-6)
    assert run.predict([]).shape == (0, 10)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError) as refused:
        run.predict([tmp_path / "a.png", tmp_path / "b.png"])
    reason = "not a readable image (no known format)"
    assert str(refused.value) == f"{tmp_path / 'b.png'}: {reason}"  # no advice on flags


def test_the_last_layer_on_the_features_gives_the_logits(run):
    features = run.features(images(5))
    assert features.shape == (5, 64)
    weights = flax_resnet.state_dict(run.model)
    logits = features @ weights["fc.weight"].T + weights["fc.bias"]
    np.testing.assert_allclose(logits, run.logits(images(5)), atol=1e-4)
    assert np.abs(features @ weights["fc.weight"].T - run.logits(images(5))).max() > 1e-3


def test_the_model_is_a_module_in_evaluation_mode(run):
    assert isinstance(run.model, nnx.Module)
    one = jnp.ones((1, 16, 16, 1))
    np.testing.assert_array_equal(run.model(one), run.model(one))


@pytest.mark.parametrize("wrong", [images(2) / 255.0, images(2)[..., 0], images(2)[:, :8], 3])
def test_other_images_are_refused(run, wrong):
    for function in (run.predict, run.features):
        with pytest.raises(InputError, match=r"uint8 \[B, 16, 16, 1\]"):
            function(wrong)


@pytest.mark.parametrize("call, words", [
    (lambda run: flax_resnet.load_run(None), "`run_dir` is a path, got NoneType"),
    (lambda run: flax_resnet.pretrained(3), "`source` is a path, a name or a URL, got int"),
    (lambda run: flax_resnet.state_dict(None), "`model` is an nnx.Module, got NoneType"),
    (lambda run: flax_resnet.load_state_dict({}, run.model), "`model` is an nnx.Module, got dict"),
    (lambda run: flax_resnet.ensemble({"a": run, "b": "runs/b"}), "b'.` is a LoadedRun, got str"),
    (lambda run: run.predict(list(images(2))), "`images` is one array, or a list of paths"),
])  # fmt: skip
def test_arguments_of_other_types_are_refused(call, words, run):
    with pytest.raises(InputError, match=words):
        call(run)


class SomeOutput(doctest.OutputChecker):
    """Compares the last line of output, if an example shows one; a training prints more."""

    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got.splitlines(keepends=True)[-1], flags)


def examples() -> list[doctest.DocTest]:
    """Examples in the docstrings of all public names and of public methods."""
    names = {"flax_resnet": flax_resnet, "jnp": jnp, "np": np}
    things = [getattr(flax_resnet, name) for name in flax_resnet.__all__]
    methods = [flax_resnet.LoadedRun.predict, flax_resnet.LoadedRun.features]
    found = [
        doctest.DocTestParser().get_doctest(inspect.getdoc(t), names, t.__qualname__, None, 0)
        for t in [*things, *methods]
    ]
    return [each for each in found if each.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_the_example_of_a_docstring_runs(example, run, run_dir, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(run_dir)
    Image.fromarray(images(1)[0, ..., 0]).save(tmp_path / "seven.png")
    monkeypatch.chdir(tmp_path)
    said = []
    doctest.DocTestRunner(SomeOutput()).run(example, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_has_an_example():
    shown = {example.name.partition(".")[0] for example in examples()}
    assert shown == set(flax_resnet.__all__)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epochs": "two"}, ["`epochs`", "valid integer", "'two'"]),
        ({"model": {"arch": "resnet19"}}, ["`arch`", "did you mean 'resnet18'?"]),
        ({"lr": 0.1}, ["`lr` is a field of a group: optimizer={'lr': ...}"]),
        ({"epoch": 3}, ["unknown field 'epoch'; did you mean 'epochs'?"]),
        ({"optimizer": {"lrr": 0.1}}, ["unknown field 'optimizer.lrr'; did you mean 'lr'?"]),
        ({"model": {"epochs": 2}}, ["unknown field 'model.epochs'; valid: arch, "]),
        ({"model": {"data": {"dataset": "digits"}}}, ["unknown field 'model.data'; valid: arch, "]),
        ({"epochs": 0, "seed": -1}, ["`epochs`", "; `seed`"]),
    ],
)
@pytest.mark.parametrize("make", [lambda values: flax_resnet.TrainConfig(**values), from_dict])
def test_a_wrong_setting_is_one_line(values, words, make):
    with pytest.raises(InputError) as fault:
        make(values)
    assert "\n" not in str(fault.value) and all(word in str(fault.value) for word in words)


def test_a_wrong_setting_is_one_line_wherever_it_is_made():
    with pytest.raises(InputError, match="`arch`: unknown 'resnet19'"):
        ModelConfig(arch="resnet19")
    with pytest.raises(InputError, match="`epochs`: .*, got 0"):
        dataclasses.replace(flax_resnet.TrainConfig(), epochs=0)


def test_no_weights_are_named_as_such():
    with pytest.raises(InputError, match="^no weights are given$"):
        flax_resnet.load_state_dict(flax_resnet.create_model("basic_cnn"), {})


def test_a_display_of_another_type_is_refused(tmp_path):
    with pytest.raises(InputError, match="`display` is a Display or None, got int"):
        flax_resnet.fit(flax_resnet.TrainConfig(), tmp_path / "run", display=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "what"), [("weights.pth", "a file"), ("", "without config.json")])
def test_what_is_no_run_is_said(tmp_path, name, what):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(InputError, match=f"is no run directory \\({what}\\)"):
        flax_resnet.load_run(tmp_path / name)
