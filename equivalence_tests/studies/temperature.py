"""Asks how much of the test loss of a run is bad calibration, and how much is wrong predictions.

All logits are divided by one number, the temperature (Guo et al. 2017), which changes no
prediction. The temperature is the one with the lowest mean loss on the validation images.

python -m equivalence_tests.studies.temperature RUN  # adds the run to results/temperature.json
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from equivalence_tests import results
from flax_resnet import machine
from flax_resnet.commands.evaluate import open_data
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import evaluation_decoder
from flax_resnet.data.sources import Source
from flax_resnet.interop.loaded_run import LoadedRun, load_run

NAME = "temperature"
LARGEST = 10  # the temperature is looked for between 1 / LARGEST and LARGEST


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    run_dir = parser.parse_args().run_dir
    row = {"revision": machine.revision()} | measure(load_run(run_dir))
    results.write(NAME, {"rows": results.known(NAME) | {run_dir.name: row}})
    print(row)


def measure(run: LoadedRun) -> dict:
    """The temperature, the accuracy, and the losses on the test images without it and with it."""
    data = open_data(run, None, "test")
    validation, test = (outputs(run, source) for source in (data.validation, data.test))
    temperature, (logits, labels) = fitted(*validation), test
    return {
        "validation_images": len(validation[1]),
        "test_images": len(labels),
        "temperature": temperature,
        "validation_loss": loss(*validation),
        "validation_loss_scaled": loss(*validation, temperature),
        "test_accuracy": float((logits.argmax(1) == labels).mean()),
        "test_loss": loss(*test),
        "test_loss_scaled": loss(*test, temperature),
    }


def outputs(run: LoadedRun, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, K]` and labels `[N]` of the images of a source."""
    forward, found = jax.jit(run.logits), []
    decoder = evaluation_decoder(run.config.data)
    for batch in pipeline.evaluation_batches(source, decoder, run.config.eval_batch_size):
        kept = batch["mask"]
        found.append((np.asarray(forward(batch["image"]))[kept], batch["label"][kept]))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean cross-entropy in nats of logits `[N, K]` that are divided by the temperature."""
    return float(losses(logits, labels, temperature).mean())


def losses(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The cross-entropies `[N]` of which `loss` is the mean."""
    rows = log_softmax(np.float64(logits) / temperature, axis=1)
    return -rows[np.arange(len(labels)), labels]


def fitted(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the lowest loss."""
    bounds = np.log(1 / LARGEST), np.log(LARGEST)
    found = minimize_scalar(
        lambda t: loss(logits, labels, np.exp(t)), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))


if __name__ == "__main__":
    main()
