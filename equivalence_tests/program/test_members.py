"""Several seeds in one program: every member is equal to its own run, and is one."""

import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivalence_tests.benchmark import members as benchmark
from equivalence_tests.parity.tolerances import MEMBERS, largest_error
from equivalence_tests.program.command import refused, run_script, train
from equivalence_tests.program.run_directory import without_training
from equivalence_tests.program.test_train import cut_at, digest, quiet, small
from flax_resnet.commands import cli
from flax_resnet.config import ParallelConfig
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.interop.ensemble import ensemble
from flax_resnet.interop.loaded_run import load_run
from flax_resnet.runs.checkpoint import Checkpoints
from flax_resnet.runs.directory import RunDirectory
from flax_resnet.runs.tables import read_rows
from flax_resnet.training.fit import fit
from flax_resnet.training.guard import NonFiniteLoss
from flax_resnet.training.members import fit_members
from flax_resnet.training.progress import Interrupted
from flax_resnet.training.restore import restore

CONFIG = small(
    seed="5",
    epochs="6",
    batch_size="16",
    model={"arch": "basic_cnn", "dropout": ".3", "dtype": "float64"},
    data={"train_images": "64", "eval_images": "40"},
    augment={"random_crop": "1", "horizontal_flip": ".5"},
    optimizer={"optimizer": "adam", "lr": ".002", "ema_decay": ".5"},
    schedule={"schedule": "constant"},
    early_stopping={"patience": "1", "monitor": "validation_accuracy"},
)
"""The two seeds stop after different epochs."""


def leaves(run_dir) -> dict[str, np.ndarray]:
    """The whole state of the newest checkpoint, and the rows of metrics.csv."""
    state = restore(run_dir, Checkpoints.latest)[3]
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
    rows = read_rows(run_dir / "metrics.csv")
    return named | {name: np.array([row[name] for row in rows]) for name in rows[0]}


def difference(one, other) -> float:
    return largest_error(leaves(one), leaves(other))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of both seeds, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in 5, 6:
        fit(cli.merge(CONFIG, {"seed": seed}), folder / str(seed), display=quiet())
    return [folder / "5", folder / "6"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The directories of both members, their reports, and the names of what all steps share."""
    root, shared, original = tmp_path_factory.mktemp("together") / "runs", [], Engine.replicate

    def watched(engine, tree):
        shared.extend(tree if isinstance(tree, dict) else [])
        return original(engine, tree)

    with mock.patch.object(Engine, "replicate", watched):
        reports = fit_members(CONFIG, root, 2, display=quiet())
    return [root / "member-0", root / "member-1"], reports, shared


def test_members_are_equal_to_their_own_runs(alone, together):
    epochs = [report["epochs"] for report in together[1]]
    assert epochs[0] != epochs[1] and min(epochs) < 6
    for member, run in zip(together[0], alone, strict=True):
        assert difference(member, run) <= MEMBERS


@pytest.fixture
def at_once(monkeypatch):
    """Members are computed as on a GPU."""
    original = Engine.__init__

    def initialize(engine, *args, **kwargs):
        original(engine, *args, **kwargs)
        engine.members_in_turn = False

    monkeypatch.setattr(Engine, "__init__", initialize)


@pytest.mark.usefixtures("at_once")
def test_members_that_a_gpu_computes_at_once_are_equal_to_their_own_runs(alone, tmp_path):
    fit_members(CONFIG, tmp_path / "runs", 2, display=quiet())
    for number, run in enumerate(alone):
        assert difference(tmp_path / "runs" / f"member-{number}", run) <= MEMBERS


@pytest.mark.slow
@pytest.mark.parametrize("way", ["in turn", "at once"])
def test_members_with_batchnorm_are_equal_to_their_own_runs(way, tmp_path, request):
    config = cli.merge(CONFIG, {"epochs": "2", "model": {"arch": "resnet20", "dropout": "0"}})
    if way == "at once":
        request.getfixturevalue("at_once")
    fit_members(config, tmp_path / "runs", 2, display=quiet())
    for number in (0, 1):
        run = tmp_path / str(number)
        fit(cli.merge(config, {"seed": str(5 + number)}), run, display=quiet())
        assert difference(tmp_path / "runs" / f"member-{number}", run) <= MEMBERS


@pytest.mark.control
def test_members_that_share_the_draws_of_one_seed_are_noticed(alone, tmp_path):
    original = Engine.compile_members

    def of_one_seed(engine, *args):
        step = original(engine, *args)
        return lambda *given: step(*given[:-1], np.full_like(given[-1], given[-1][0]))

    with mock.patch.object(Engine, "compile_members", of_one_seed):
        config = cli.merge(CONFIG, {"epochs": "1"})
        fit_members(config, tmp_path / "runs", 2, display=quiet())
    first, second = (
        read_rows(tmp_path / "runs" / name / "metrics.csv") for name in ("member-0", "member-1")
    )
    losses = [read_rows(run / "metrics.csv")[0]["train_loss"] for run in alone]
    assert abs(first[0]["train_loss"] / losses[0] - 1) <= MEMBERS
    assert abs(second[0]["train_loss"] / losses[1] - 1) > 1e-6


def test_members_are_cut_off_and_resumed_together(together, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        cut_at(6, patch)
        fit_members(CONFIG, tmp_path / "runs", 2, display=quiet())
    places = [tmp_path / "runs" / f"member-{number}" for number in (0, 1)]
    assert all((place / "checkpoints" / "6").is_dir() for place in places)
    fit_members(CONFIG, tmp_path / "runs", 2, resume=True, display=quiet())
    assert list(map(digest, places)) == list(map(digest, together[0]))


@pytest.mark.slow
def test_a_member_whose_newest_checkpoint_is_lost_catches_up(together, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        cut_at(6, patch)
        fit_members(CONFIG, tmp_path / "runs", 2, display=quiet())
    shutil.rmtree(tmp_path / "runs" / "member-1" / "checkpoints" / "6")
    fit_members(CONFIG, tmp_path / "runs", 2, resume=True, display=quiet())
    for number, member in enumerate(together[0]):
        assert difference(tmp_path / "runs" / f"member-{number}", member) <= MEMBERS


def test_members_are_runs_and_make_an_ensemble(together):
    runs = {str(place): load_run(place) for place in together[0]}
    assert [run.config.seed for run in runs.values()] == [5, 6]
    images = np.zeros((1, 8, 8, 1), np.uint8)
    mean = np.mean([run.predict(images) for run in runs.values()], 0)
    np.testing.assert_allclose(ensemble(runs).predict(images), mean, rtol=1e-9)


def test_members_share_the_images_on_the_device(together):
    assert together[2].count("image") == 1


def test_several_steps_of_members_are_one_dispatch():
    engine = Engine(ParallelConfig(devices=1, steps_per_dispatch=3))

    def step(state, batch, seed):
        return state + seed * batch["index"][0], {"loss": state}

    batches = ({"index": jnp.full((3, 2), 2, jnp.int32)},) * 2
    states, metrics = engine.compile_members(step, 3)(
        (jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)), {}, batches, np.array([1, 5], np.int32)
    )
    assert list(map(int, states)) == [6, 31]
    assert [list(map(int, found["loss"])) for found in metrics] == [[0, 2, 4], [1, 11, 21]]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all(tmp_path):
    config = cli.merge(CONFIG, {"optimizer": {"lr": "1e30"}, "model": {"dtype": "float32"}})
    with pytest.raises(NonFiniteLoss, match="step"):
        fit_members(config, tmp_path / "runs", 2, display=quiet())


@pytest.mark.parametrize(
    "flags,words",
    [
        (("--members", "0"), "--members: at least 1, got 0"),
        (("--members", "2000000000"), "--members: at most 1,000, got 2000000000"),
        (("--members", "2", "--devices", "2"), "--members share one device of 2: give --devices 1"),
        (("--members", "2", "--parallel", "pmap"), "--members need --parallel jit"),
        (("--members", "2", "--profile", "3"), "--members and --profile exclude each other"),
        (("--members", "2", "--seed", "2147483647"), "--seed"),
    ],
)
def test_what_members_cannot_do_is_refused(tmp_path, flags, words):
    refused(train(tmp_path / "runs", *flags), words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("members", [0, 1001, 2**31])
def test_the_number_of_members_is_bounded_before_anything_is_made(tmp_path, members):
    with pytest.raises(InputError, match=f"`members`: from 1 to 1,000, got {members}"):
        fit_members(CONFIG, tmp_path / "runs", members, display=quiet())


def test_members_do_not_begin_inside_a_run(alone):
    refused(train(alone[0], "--members", "2"), "is a run itself: --members need another directory")
    with pytest.raises(InputError, match="is a run itself"):
        fit_members(CONFIG, alone[0], 2, display=quiet())


def test_members_of_another_training_do_not_stay_beside_new_ones(tmp_path):
    """`evaluate runs/member-*` would average both."""
    for number in range(3):
        without_training(tmp_path / "runs" / f"member-{number}")
    for how in ("overwrite", "resume"):
        with pytest.raises(InputError, match="member-2 would be no member"):
            fit_members(CONFIG, tmp_path / "runs", 2, display=quiet(), **{how: True})


def test_members_that_were_begun_with_another_seed_are_not_taken_up(together):
    root = together[0][0].parent
    refused(train(root, "--members", "2", "--resume", "--seed", "9"), "seed 9 (the run has 5)")
    other = root / "other"
    shutil.copytree(together[0][1], other / "member-0")
    shutil.copytree(together[0][1], other / "member-1")
    with pytest.raises(InputError, match="member-1 is no such member: seed 7"):
        fit_members(CONFIG, other, 2, resume=True, display=quiet())


def test_finished_members_of_different_settings_are_not_members(tmp_path):
    for number, size in enumerate((8, 16)):
        place = tmp_path / "runs" / f"member-{number}"
        config = cli.merge(CONFIG, {"seed": str(5 + number), "data": {"image_size": str(size)}})
        RunDirectory(place).write_config(config)
        (place / "report.json").write_text("{}")
    outcome = run_script("train.py", "--resume", "--run-dir", tmp_path / "runs", "--members", 2)
    refused(outcome, "member-1 is no such member: data.image_size 8 (the run has 16)")


def test_the_benchmark_says_how_much_faster_members_are(tmp_path):
    """Members share their seconds; the first epoch, which compiles, does not count."""
    for name, rates in {"0": (1, 4, 4, 9), "1": (1, 4, 4, 9)}.items():
        place = tmp_path / name
        place.mkdir()
        rows = "".join(f"{number},{rate}\n" for number, rate in enumerate(rates))
        (place / "timings.csv").write_text(f"epoch,images_per_second\n{rows}")
    places = sorted(tmp_path.iterdir())
    assert benchmark.speed(places, together=True) == 8
    assert benchmark.speed(places, together=False) == 4
    turn = {"members": {"wall": 10, "images_per_second": 8}}
    turn["alone"] = {"wall": 20, "images_per_second": 5}
    assert benchmark.summary([turn]) == {"images_per_second_ratio": 1.6, "wall_ratio": 2}
