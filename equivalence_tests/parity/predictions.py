"""Agreement of two networks on the classes of a data set's images, in float32."""

import dataclasses
import functools

import jax
import numpy as np
import torch
from torch import nn

import flax_resnet
from equivalence_tests.parity import torch_side
from equivalence_tests.parity.inputs import Case
from flax_resnet.config import DataConfig, ModelConfig, TrainConfig
from flax_resnet.data import pipeline
from flax_resnet.data.prepare import prepare
from flax_resnet.errors import InputError
from flax_resnet.text import listed
from flax_resnet.training.network import Network, Preprocess, predict_logits

BATCH = 250

ROUNDING = 1e-3
"""Largest difference of logits in float32, relative to the largest, that counts as rounding. Five
networks of this project, up to ResNet-110, differ by at most 1e-6 on digits; trained weights may
amplify rounding more."""


def agreement(
    case: Case, data: DataConfig, model: nn.Module | None, class_names: tuple[str, ...] = ()
) -> dict:
    """Compares predictions on the test split in JAX and in PyTorch.

    Args:
      case: the weights.
      data: the data set and its preprocessing.
      model: the PyTorch network; None: the twin, this project's PyTorch network.
      class_names: in the order of the logits; (): the order of the data set.

    Returns:
      Counts, accuracies and differences; "normalisation" holds a mean or std that is not given and
      was measured on the training images.

    Raises:
      InputError: classes or channels of the data set differ from those of the weights.
    """
    network = ModelConfig(
        arch=case.arch, stem=case.stem, shortcut=case.shortcut, num_classes=case.num_classes
    )
    data = dataclasses.replace(data, cache="none")
    prepared = prepare(TrainConfig(model=network, data=data, batch_size=1))
    channels = case.arrays["conv1.weight"].shape[1]
    if prepared.dataset.channels != channels:
        raise InputError(f"{data.dataset} has {prepared.dataset.channels} channels, not {channels}")
    names = prepared.dataset.class_names
    if sorted(class_names or names) != sorted(names):
        raise InputError(
            f"{data.dataset} has the classes {listed(names)}, not {listed(class_names)}"
        )
    order = np.array([(class_names or names).index(name) for name in names])
    ours, theirs = _jax_logits(case, prepared.config.data), _torch_logits(case, model)
    labels, got, expected = [], [], []
    for batch in pipeline.evaluation_batches(prepared.dataset.test, prepared.decoder, BATCH):
        images, kept = batch["image"], batch["mask"]
        labels.append(order[batch["label"][kept]])
        got.append(np.asarray(ours(images))[kept])
        expected.append(theirs(_normalised(images, prepared.config.data))[kept])
    measured = [name for name in ("mean", "std") if getattr(data, name) is None]
    return _summary(data.dataset, *map(np.concatenate, (labels, got, expected))) | {
        "normalisation": {name: list(getattr(prepared.config.data, name)) for name in measured}
    }


def _summary(dataset, labels, got, expected) -> dict:
    classes, reference = got.argmax(1), expected.argmax(1)
    return {
        "dataset": dataset,
        "images": len(labels),
        "agree": int((classes == reference).sum()),
        "accuracy": float((classes == labels).mean()),
        "reference_accuracy": float((reference == labels).mean()),
        "largest_difference": float(np.abs(got - expected).max()),
        "relative_difference": float(np.abs(got - expected).max() / np.abs(expected).max()),
    }


def accuracies(found: dict) -> str:
    """The accuracies of both networks, and which constants of the images are not known."""
    text = f"accuracy {found['accuracy']:.4f} and {found['reference_accuracy']:.4f}"
    names = " and ".join(found["normalisation"])
    return text + (f", with the {names} of the training images" if names else "")


def explanation(found: dict) -> str:
    """The sentence about networks that agree on random images and not on those of the data set."""
    return (
        f"the logits of the images of {found['dataset']} in float32 differ by"
        f" {found['relative_difference']:.1e} of the largest, more than rounding; on random images"
        " every tensor agrees"
    )


def _jax_logits(case, data):
    model = flax_resnet.create_model(
        case.arch,
        case.num_classes,
        stem=case.stem,
        shortcut=case.shortcut,
        in_channels=len(data.mean),
    )
    network = Network(flax_resnet.load_state_dict(model, case.arrays))
    preprocess = Preprocess(data.mean, data.std)
    # Weights are an argument: the compiler would fold them if they were constants.
    logits = jax.jit(functools.partial(predict_logits, network, preprocess))
    return functools.partial(logits, network.initial)


def _torch_logits(case, model):
    model = (torch_side.make_model(case, np.float32) if model is None else model.float()).eval()

    @torch.no_grad()
    def logits(images):
        return model(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()

    return logits


def _normalised(images, data) -> np.ndarray:
    """torchvision's ToTensor and Normalize."""
    unit = images.astype(np.float32) / 255
    return (unit - np.array(data.mean, np.float32)) / np.array(data.std, np.float32)
