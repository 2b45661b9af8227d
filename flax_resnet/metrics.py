"""Metrics of a confusion matrix, with scikit-learn's definitions."""

import numpy as np


def summarize(confusion) -> dict[str, float]:
    """Accuracy and averaged metrics of a confusion matrix.

    Args:
      confusion: `[K, K]` counts, row = true class, column = predicted class.

    Returns:
      accuracy, and precision, recall and F1 as macro, micro and weighted means, all in [0, 1].
      The macro mean is over the classes that occur, as label or as prediction; a class that is
      never predicted has precision 0, as scikit-learn's `zero_division=0`.
    """
    confusion = np.asarray(confusion, np.int64)
    correct, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    accuracy = _ratio(correct.sum(), confusion.sum())
    summary = {"accuracy": float(accuracy)}
    occurs = (true + predicted) > 0
    for name, scores in per_class(confusion).items():
        if name == "support":
            continue
        summary[f"{name}_macro"] = float(scores[occurs].mean()) if occurs.any() else 0.0
        summary[f"{name}_micro"] = float(accuracy)  # one label an image: all three are accuracy
        summary[f"{name}_weighted"] = float(_ratio((scores * true).sum(), true.sum()))
    return summary


def per_class(confusion) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and support of each class, `[K]` each, by name."""
    confusion = np.asarray(confusion, np.int64)
    correct, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, true),
        "f1": _ratio(2 * correct, true + predicted),
        "support": true,
    }


BINS = 15
"""Bins of the probability of a prediction, (0, 1/15], (1/15, 2/15], ..., (14/15, 1]."""


def calibration_error(bins) -> float:
    """The expected calibration error (Guo et al. 2017): the mean over the images of the difference
    between the accuracy and the mean probability of the predictions in the image's bin.

    Args:
      bins: `[3, BINS]`: images, hits and sum of the probabilities of each bin.
    """
    images, hits, probabilities = np.asarray(bins, np.float64)
    return float(_ratio(np.abs(hits - probabilities).sum(), images.sum()))


def _ratio(numerator, denominator):
    """The quotient of counts, and 0 where both are 0."""
    return np.asarray(numerator) / np.maximum(np.asarray(denominator), 1)
