"""Evaluating a split, and classifying images."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet import metrics
from flax_resnet.config import ParallelConfig
from flax_resnet.data import pipeline
from flax_resnet.devices.parallel import Engine
from flax_resnet.errors import InputError
from flax_resnet.training import steps
from flax_resnet.training.network import predict_logits


def evaluate(
    engine, eval_fn, variables, batches: Iterable[dict]
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Exact metrics of a split, whatever the batch size.

    Args:
      engine: `parallel.Engine`.
      eval_fn: `engine.compile_eval(steps.make_eval_step(...))`.
      batches: `pipeline.evaluation_batches`.

    Returns:
      {"loss", "accuracy", "top5_accuracy", "precision_macro", ...}, the confusion matrix
      `[K, K]`, row = true class, and the bins of `metrics.calibration_error`. Loss in nats an
      image.

    Raises:
      InputError: there is no batch.
    """
    variables = engine.whole(variables)
    counts, losses, bins = None, [], []
    for batch in batches:
        sums = eval_fn(variables, engine.shard_eval(inputs_of(batch)))
        losses.append(sums.pop("loss"))
        bins.append(sums.pop("bins"))
        counts = sums if counts is None else jax.tree.map(jnp.add, counts, sums)
    if counts is None:
        raise InputError("none of the images can be read")
    counts = jax.device_get(counts)
    loss = float(np.sum(jax.device_get(losses), dtype=np.float64)) / int(counts["count"])
    bins = np.sum(jax.device_get(bins), axis=0, dtype=np.float64)
    summary = metrics.summarize(counts["confusion"])
    top5 = int(counts["top5"]) / int(counts["count"])
    accuracy = summary.pop("accuracy")
    figures = {"loss": loss, "accuracy": accuracy, "top5_accuracy": top5, **summary}
    figures["expected_calibration_error"] = metrics.calibration_error(bins)
    return figures, counts["confusion"], bins


def inputs_of(batch: dict) -> dict:
    """The arrays of a batch that a compiled evaluation takes."""
    return {name: batch[name] for name in ("image", "label", "mask")}


def evaluate_split(run, split: str, variables=None) -> tuple[dict, np.ndarray, np.ndarray]:
    """`evaluate` on a split of a run's data.

    Args:
      run: `setup.Run`.
      split: "train", "validation" or "test".
      variables: `network.Variables`; by default those of the run's state.
    """
    if variables is None:
        variables = steps.evaluation_variables(run.engine.single(run.state))
    source, images = getattr(run.dataset, split), run.prepared.images.get(split)
    devices = len(run.engine.devices)
    size = -(-run.config.eval_batch_size // devices) * devices
    rows = run.engine.local_rows(size)
    batches = pipeline.evaluation_batches(source, run.prepared.decoder, size, images, rows)
    return evaluate(run.engine, run.eval_fn, variables, batches)


def make_outcomes(network, preprocess):
    """(variables, batch) -> the prediction, its probability and the loss of each image, `[B]`
    each."""

    def outcomes(variables, batch):
        logits = predict_logits(network, preprocess, variables, batch["image"])
        log_probabilities = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(log_probabilities, batch["label"][:, None], axis=1)
        return {
            "prediction": logits.argmax(-1),
            "probability": jnp.exp(log_probabilities.max(-1)),
            "loss": -own[:, 0],
        }

    return outcomes


def make_predict(network, preprocess, kernels: str):
    """A compiled function of one device: (variables, uint8 images `[B, H, W, C]`) ->
    probabilities `[B, K]`."""

    def predict(variables, images):
        return jax.nn.softmax(predict_logits(network, preprocess, variables, images))

    return Engine(ParallelConfig(devices=1), kernels=kernels).compile_eval(predict)
