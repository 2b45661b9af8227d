"""The examples of docs/train.md with the real Optuna, MLflow and Weights & Biases, on disk."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from equivalence_tests.program.command import ROOT

SMALL = """
import flax_resnet, functools
flax_resnet.TrainConfig = functools.partial(
    flax_resnet.TrainConfig, epochs=2, batch_size=32, model={"arch": "basic_cnn"},
    data={"train_images": 128, "eval_images": 64},
)
"""
CHECKS = {
    "optuna": """
states = [trial.state.name for trial in study.trials]
assert len(states) == 3 and "COMPLETE" in states and study.best_value > 0, states
""",
    "mlflow": """
[run] = mlflow.search_runs(output_format="list")
history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation_accuracy")
assert [point.step for point in history] == [4, 8] and run.data.params["batch_size"] == "32"
""",
    "wandb": """
import glob
assert glob.glob("wandb/offline-run-*/*.wandb")
""",
}


def example(package: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/train.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if f"flax_resnet, {package}" in block]
    return code.replace("n_trials=20", "n_trials=3")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["optuna", "mlflow", "wandb"])
def test_the_example_of_a_tracker_runs(package, tmp_path):
    """The package is installed aside, and what is here already is taken first."""
    aside = tmp_path / "packages"
    name = {"mlflow": "mlflow-skinny"}.get(package, package)
    uv = shutil.which("uv") or pytest.skip("uv, which installs the package aside, is not here")
    words = [uv, "pip", "install", "-q", "--python", sys.executable, "--target", aside, name]
    subprocess.run(list(map(str, words)), check=True)
    code = (
        f"import sys; sys.path.append({str(aside)!r})\n{SMALL}{example(package)}{CHECKS[package]}"
    )
    place = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "WANDB_MODE": "offline"}
    allowed = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | place | allowed | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
