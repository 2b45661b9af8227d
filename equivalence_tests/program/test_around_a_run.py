"""Callbacks, traces, hyper-parameters and comparisons of runs, and rows of predictions."""

import base64
import csv
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.calibration import calibration_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import flax_resnet
from equivalence_tests.program.command import refused, run_script, train
from flax_resnet import metrics
from flax_resnet.config import DataConfig, ModelConfig
from flax_resnet.errors import InputError
from flax_resnet.runs.display import Display
from flax_resnet.runs.owned import foreign
from flax_resnet.runs.tables import read_rows
from flax_resnet.training import report

QUIET = Display(Console(quiet=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in the learning rate; three steps of the first are traced."""
    folder = tmp_path_factory.mktemp("runs")
    outcome = train(folder / "one", "--profile", 3)
    assert outcome.status == 0, outcome.err
    outcome = train(folder / "two", "--lr", 0.0001)
    assert outcome.status == 0, outcome.err
    return folder


def config(**fields):
    data = DataConfig(train_images=256, eval_images=64)
    model = ModelConfig(arch="basic_cnn")
    fields = {"epochs": 2, "batch_size": 32, "log_steps": 3} | fields
    return flax_resnet.TrainConfig(data=data, model=model, **fields)


def test_callbacks_are_told_of_steps_epochs_and_the_end(tmp_path):
    told = []
    report = flax_resnet.fit(
        config(),
        tmp_path / "run",
        display=QUIET,
        callbacks=[lambda *event: told.append(event), lambda *_: None],
    )
    events = [(event, step) for event, step, _ in told]
    epoch = [("step", 3), ("step", 6), ("step", 8), ("epoch", 8)]
    later = [(event, step + 8) for event, step in epoch]
    assert events == [*epoch, *later, ("end", 16)]
    rows = [values for event, _, values in told if event == "epoch"]
    for row, written in zip(rows, read_rows(tmp_path / "run/metrics.csv"), strict=True):
        assert written.items() <= row.items() and row["images_per_second"] > 0
    assert told[-1][2] == report and told[0][2]["learning_rate"] > 0


class Pruned(Exception):
    """An exception as Optuna's."""


class Closed(Exception):
    """An exception that takes no attributes."""

    def __setattr__(self, name, value):
        if not name.startswith("__"):
            raise AttributeError(name)
        super().__setattr__(name, value)


@pytest.mark.parametrize(
    "where, kind",
    [
        ("step", Closed),
        pytest.param("step", Pruned, marks=pytest.mark.slow),
        pytest.param("epoch", Pruned, marks=pytest.mark.slow),
    ],
)
def test_an_exception_of_a_callback_ends_the_training_with_the_work_saved(tmp_path, where, kind):
    def callback(event, step, values):
        if (event, step) == (where, {"step": 11, "epoch": 8}[where]):
            raise kind

    how = {"display": QUIET, "resume": True}
    slow = config(checkpoint_epochs=2)
    with pytest.raises(kind) as error:
        flax_resnet.fit(slow, tmp_path / "run", **how, callbacks=[callback])
    assert getattr(error.value, "saved", kind is Closed)
    told = []
    flax_resnet.fit(slow, tmp_path / "run", **how, callbacks=[lambda *e: told.append(e)])
    assert told[0][1] == {"step": 14, "epoch": 11}[where]
    rows = read_rows(tmp_path / "run/metrics.csv")
    flax_resnet.fit(slow, tmp_path / "whole", display=QUIET)
    assert rows == read_rows(tmp_path / "whole/metrics.csv")


@pytest.mark.parametrize("wrong, words", [
    ({"callbacks": [print, 3]}, "`callbacks`: 3 is no function"),
    ({"callbacks": print}, "`callbacks` is a list of functions, got builtin_function_or_method"),
    ({"config": {"epochs": 1}}, "`config` is a TrainConfig, got dict"),
    ({"run_dir": 3}, "`run_dir` is a path or None, got int"),
    ({"profile": "all"}, "`profile` is a number of steps, got str"),
])  # fmt: skip
def test_arguments_of_other_types_are_refused(wrong, words, tmp_path):
    with pytest.raises(InputError, match=words):
        flax_resnet.fit(**{"config": config(), "run_dir": tmp_path / "run"} | wrong)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_hyper_parameters(runs):
    events = EventAccumulator(str(runs / "one")).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert start["optimizer.lr"].number_value == 0.003
    assert start["model.arch"].string_value == "basic_cnn"
    report = json.loads((runs / "one/report.json").read_text())
    [point] = events.Scalars("test/accuracy")
    assert point.value == pytest.approx(report["splits"]["test"]["accuracy"])


def test_steps_are_traced_for_the_viewers(runs):
    [trace] = (runs / "one/plugins/profile").glob("*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(trace))
    names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
    assert names.count("train") == 3  # the annotations from which the viewers count steps
    assert sum("Execute" in name for name in names) >= 3
    assert foreign(runs / "one") == [] and not (runs / "two/plugins").exists()


def test_traces_of_no_step_or_of_too_many(tmp_path):
    refused(train(tmp_path / "run", "--profile", 0), "--profile: at least 1")
    assert not (tmp_path / "run").exists()
    said = io.StringIO()
    display = Display(Console(file=said, width=200))
    flax_resnet.fit(config(epochs=1), tmp_path / "run", profile=9, display=display)
    assert "3 steps too few were left to trace" in said.getvalue()


def test_runs_are_compared(runs, tmp_path):
    plot, out = tmp_path / "curves.png", tmp_path / "runs.json"
    outcome = run_script("compare.py", runs / "one", runs / "two", "--plot", plot, "--json", out)
    assert outcome.status == 0, outcome.err
    found = json.loads(out.read_text())
    assert list(found["settings"]) == ["optimizer.lr"]
    lr = found["settings"]["optimizer.lr"]
    assert lr == {str(runs / "one"): 0.003, str(runs / "two"): 0.0001}
    one = json.loads((runs / "one/report.json").read_text())["splits"]["test"]
    assert found["figures"][str(runs / "one")]["test_loss"] == one["loss"]
    assert found["best"]["test_loss"] == one["loss"]
    assert f"{one['loss']:.4f}*" in outcome.out and "optimizer.lr" in outcome.out
    assert Image.open(plot).size[0] > 1000


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    one = runs / "one"
    refused(run_script("compare.py", one), "two or more")
    refused(run_script("compare.py", one, tmp_path), str(tmp_path))
    wrong = ["--plot", tmp_path / "a.txt"]
    refused(run_script("compare.py", one, runs / "two", *wrong), "ends in .png")
    assert list(tmp_path.iterdir()) == []


def test_predictions_of_a_split_add_up_to_its_figures(runs, tmp_path):
    table, page, out = tmp_path / "rows.csv", tmp_path / "worst.html", tmp_path / "figures.json"
    flags = ["--predictions", table, "--worst", page, "--json", out]
    outcome = run_script("evaluate.py", runs / "one", *flags)
    assert outcome.status == 0, outcome.err
    rows, figures = list(csv.DictReader(table.open())), json.loads(out.read_text())
    assert list(rows[0]) == ["path", "label", "prediction", "probability", "loss"]
    assert [row["path"] for row in rows] == [f"test/{i}" for i in range(figures["images"])]
    hits = np.array([row["label"] == row["prediction"] for row in rows])
    probabilities = np.array([float(row["probability"]) for row in rows])
    losses = np.array([float(row["loss"]) for row in rows])
    assert figures["accuracy"] == hits.mean()
    assert figures["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert figures["expected_calibration_error"] == pytest.approx(error_of(hits, probabilities))
    report = json.loads((runs / "one/report.json").read_text())["splits"]["test"]
    assert report.items() <= figures.items()
    check_page(page.read_text(), rows, losses, flax_resnet.load_run(runs / "one"))


def check_page(page: str, rows: list[dict], losses: np.ndarray, run):
    """The page shows the rows of the largest losses, with the images that the network sees."""
    shown = re.findall(r'class="path">(\S+?)<', page)
    assert shown == [rows[i]["path"] for i in np.argsort(-losses, kind="stable")[:60]]
    pictures = re.findall(r'base64,([^"]+)"', page)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    [probabilities] = run.predict(pixels[None, ..., None])
    first = rows[int(np.argmax(losses))]
    assert run.class_names[probabilities.argmax()] == first["prediction"]
    assert probabilities.max() == pytest.approx(float(first["probability"]), rel=1e-3)


def error_of(hits, probabilities) -> float:
    """The expected calibration error, from scikit-learn's reliability curve."""
    accuracy, mean = calibration_curve(hits, probabilities, n_bins=metrics.BINS)
    counts, _ = np.histogram(probabilities, np.linspace(0, 1, metrics.BINS + 1))
    return float(np.abs(accuracy - mean) @ counts[counts > 0] / len(hits))


def test_unreadable_files_are_not_among_the_predictions(insects, folder, tmp_path):
    for kind in ("ant", "bee"):
        files = sorted(p for p in folder.rglob("*.*") if p.parent.name == kind)
        for split in ("train", "val", "test"):
            (tmp_path / "set" / split / kind).mkdir(parents=True, exist_ok=True)
            for number, file in enumerate(files[:3]):
                place = tmp_path / "set" / split / kind / f"{number}{file.suffix}"
                place.write_bytes(b"" if number == 1 else file.read_bytes())
    table = tmp_path / "rows.csv"
    flags = ["--dataset", f"folder:{tmp_path / 'set'}", "--on-bad-image", "skip"]
    outcome = run_script("evaluate.py", insects, *flags, "--predictions", table)
    assert outcome.status == 0, outcome.err
    rows = list(csv.DictReader(table.open()))
    names = [(row["label"], row["path"].rpartition("/")[2][0]) for row in rows]
    assert names == [("ant", "0"), ("ant", "2"), ("bee", "0"), ("bee", "2")]
    refused(run_script("evaluate.py", insects, "--worst", tmp_path / "no" / "a.html"), "--worst")


def test_the_speed_of_a_run_leaves_out_what_compiles():
    """The first epoch, and the first one after a resume."""
    rows = [{"steps": 10, "seconds": s, "data_wait_seconds": 0.0} for s in (60, 10, 60, 10, 10)]
    assert report.speed(rows, batch_size=2)["images_per_second"] == 2
