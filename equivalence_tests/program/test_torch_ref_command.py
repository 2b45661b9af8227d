"""The twin's command: bad input, config files, run directories that exist."""

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch._utils import ExceptionWrapper

from equivalence_tests.program.twin import call
from flax_resnet.errors import InputError
from torch_ref import (
    loop,
)
from torch_ref import train as torch_train


def test_what_cuda_cannot_do_the_same_twice_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert call("--arch", "basic_cnn", "--deterministic") == 2
    assert "AdaptiveAvgPool2d" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--label-smoothing", "2"], "--label-smoothing"),
        (["--mean", *"000", "--std", *"111"], "--mean has 3 values, the images 1 channel"),
        (["--test-fraction", "0"], "--test-fraction 0"),
        (["--test-fraction", "0.001"], "--test-fraction 0.001"),
        (["--arch", "resnet81"], "resnet18"),
        (["--dataset", "folder:missing"], "missing"),
        (["--dataset", "tfds:cifar10"], "--dataset 'tfds:cifar10'"),
        (["--dataset", "digit"], "digit"),
        (["--batch-size", "5000"], "--batch-size 5000"),
        (["--num-classes", "11"], "--num-classes 11"),
        (["--optimizer", "sdg"], "sdg"),
        (["--epoch", "3"], "--epoch"),
        (["--arch", "resnet20", "--stem", "cifar"], "--stem 'cifar'"),
        (["--arch", "basic_cnn", "--zero-init-residual"], "no residual blocks"),
        (["--cycle-momentum", "--momentum", "0"], "momentum 0"),
        (["--gamma", "0.5"], "gamma has no effect"),
        (["--validation-fraction", "0", "--patience", "3"], "early stopping"),
        (["--init-from", "nowhere.pth"], "nowhere.pth"),
        (["--recipe", "imagenette-cmn"], "imagenette-cnn"),
        (["--recipe", "transfer"], "transfer-source"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, word, tmp_path, capsys):
    assert call(*flags, "--run-dir", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert word in message and message.count("\n") == 1 and message.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_worker_is_one_line(tmp_path, capsys):
    """DataLoader puts the worker's traceback before the message."""

    def read(*_):
        try:
            raise InputError("x.png is no image")
        except InputError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with mock.patch.object(loop, "train", read):
        assert call("--train-images", "128", "--run-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err == "error: x.png is no image\n"


def test_a_config_file_is_a_starting_point(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 7, "optimizer": {"lr": 0.5}}))
    flags = ["--config", tmp_path / "config.json", "--lr", "0.25", "--smoke"]
    with mock.patch.object(torch_train, "fit") as fit:
        assert call(*flags, "--run-dir", "run", "--device", "cpu") == 0
    config, run_dir = fit.call_args.args
    assert (config.epochs, config.optimizer.lr, config.data.train_images) == (1, 0.25, 32)
    assert run_dir == "run" and fit.call_args.kwargs["device"] == "cpu"


def test_a_run_directory_is_never_written_over(tmp_path):
    (tmp_path / "report.json").write_text("mine")
    command = [sys.executable, "-m", "torch_ref.train", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "report.json").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run_with_status_1(tmp_path, capsys):
    flags = ["--arch", "basic_cnn", "--lr", "1e30", "--train-images", "256", "--epochs", "1"]
    assert call(*flags, "--run-dir", tmp_path / "run") == 1
    assert capsys.readouterr().err.startswith("failed: the loss of step")
