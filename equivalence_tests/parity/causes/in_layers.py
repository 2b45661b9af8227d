"""Faults of a forward pass, of the loss and of a ReLU's gradient."""

import functools
import re
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from equivalence_tests.parity.causes.evidence import Evidence, constant, same


def other_epsilon(evidence: Evidence) -> list[str]:
    """Solves a BatchNorm's output for its eps."""
    beta = evidence.weights("bias").reshape(1, -1, 1, 1)
    expected = evidence.expected - beta
    clear = np.abs(expected) > 1e-3 * np.abs(expected).max()
    ratio = [np.median(((evidence.got - beta) / expected)[:, c][clear[:, c]])
             for c in range(beta.size)]  # fmt: skip
    variance = _variance(evidence)
    found = (variance + 1e-5) / np.square(ratio) - variance
    epsilon = constant(found, spread=1e-6, noise=_EPS_NOISE)
    if epsilon is None or epsilon < -_EPS_NOISE or abs(epsilon - 1e-5) < _EPS_NOISE:
        return []
    exact = 0.0 if abs(epsilon) < _EPS_NOISE else epsilon
    known = " (Keras and TensorFlow)" if abs(epsilon - 1e-3) < 1e-6 else ""
    return [f"eps is {exact:.6g} instead of 1e-05{known} in {evidence.module}"]


_EPS_NOISE = 1e-10
"""Error of a solved eps. A variance near 1, solved for in float64, is exact to about 1e-14; one
read from running statistics loses some digits."""


def _variance(evidence) -> np.ndarray:
    """The variance by which a BatchNorm normalised."""
    name = f"{evidence.module}.running_var"
    old = np.asarray(evidence.case.arrays[name], np.float64)
    if "batch_norm" not in evidence.standard:
        return old
    n = evidence.expected.size / evidence.expected.shape[1]
    return (evidence.standard["batch_norm"][name] - 0.9 * old) / 0.1 * (n - 1) / n


def other_convolution(evidence: Evidence) -> list[str]:
    """Recomputes a convolution with each known fault."""
    kernel = torch.from_numpy(evidence.weights("weight").copy())
    if kernel.ndim != 4:
        return []
    for x in map(torch.from_numpy, evidence.inputs()):
        for stride in (1, 2):
            if _convolves(x, kernel, stride, evidence.expected):
                return [
                    w for w, f in CONVOLUTIONS.items() if _explains(evidence, f, x, kernel, stride)
                ]
    return []


def _explains(evidence, convolution, x, kernel, stride) -> bool:
    try:
        return evidence.has(convolution(x, kernel, stride))
    except RuntimeError:  # a map smaller than the kernel, without padding
        return False


def _convolves(x, kernel, stride, expected) -> bool:
    if x.ndim != 4 or x.shape[1] % kernel.shape[1]:
        return False
    return same(_convolution(x, kernel, stride), expected)


def _convolution(x, kernel, stride, padding=None):
    padding = kernel.shape[2] // 2 if padding is None else padding
    return F.conv2d(x, kernel, None, stride, padding, 1, x.shape[1] // kernel.shape[1])


def _same_padding(x, kernel, stride):
    return _convolution(padded_same(x, kernel.shape[2:], (stride, stride), 0.0), kernel, stride, 0)


def padded_same(x, window, stride, value, dilation=(1, 1)):
    """[B, C, H, W] padded as TensorFlow's "SAME", the odd pixel at the end, with a value.

    Args:
      window, stride, dilation: (height, width).
    """
    pads = []
    for size, k, s, d in list(zip(x.shape[2:], window, stride, dilation, strict=True))[::-1]:
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def _tf32(x):
    bits = x.float().numpy().view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> 13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return torch.from_numpy(rounded.view(np.float32)).double()


def _with_interleaved_groups(x, kernel, stride):
    return interleaved(_convolution(x, kernel, stride), x.shape[1] // kernel.shape[1])


def interleaved(out, groups):
    """The channels of a grouped convolution in the order of a wrong reshape."""
    batch, _, *size = out.shape
    return out.reshape(batch, groups, -1, *size).transpose(1, 2).reshape(out.shape)


CONVOLUTIONS: dict[str, Callable] = {
    "the kernel's height and width are swapped": lambda x, k, s: _convolution(
        x, k.transpose(2, 3), s
    ),
    'padding is "SAME", which is lopsided at stride 2': _same_padding,
    "operands are rounded to TF32": lambda x, k, s: _convolution(_tf32(x), _tf32(k), s),
    "groups are interleaved": _with_interleaved_groups,
    "the stride is wrong": lambda x, k, s: _convolution(x, k, 3 - s),
    "there is no padding": lambda x, k, s: _convolution(x, k, s, 0),
    "the kernel is rotated by 180 degrees": lambda x, k, s: _convolution(x, k.flip(2, 3), s),
}


def other_pool(evidence: Evidence) -> list[str]:
    if evidence.module != "maxpool":
        return []
    x = next(
        x
        for x in map(torch.from_numpy, evidence.inputs())
        if same(F.max_pool2d(x, 3, 2, 1), evidence.expected)
    )
    variants = {
        'the max-pool pads "SAME"': F.max_pool2d(padded_same(x, (3, 3), (2, 2), -np.inf), 3, 2),
        "the max-pool has no padding": F.max_pool2d(x, 3, 2),
        "it is an average pool": F.avg_pool2d(x, 3, 2, 1),
    }
    return [why for why, prediction in variants.items() if evidence.has(prediction)]


def other_loss(evidence: Evidence) -> list[str]:
    names = list(evidence.standard["loss"])
    if evidence.row.name != names[-1]:
        return []
    logits = torch.from_numpy(np.asarray(evidence.standard["forward"]["fc"]))
    labels = torch.from_numpy(evidence.case.labels[-1])
    smoothing, classes = evidence.case.rule.get("label_smoothing", 0.0), logits.shape[1]
    loss = functools.partial(F.cross_entropy, logits, labels)
    variants = {
        "label smoothing spreads e / (K - 1) over the other classes": loss(
            label_smoothing=smoothing * classes / (classes - 1)
        ),
        "there is no label smoothing": loss(),
        "the loss is a sum instead of a mean": loss(label_smoothing=smoothing, reduction="sum"),
    }
    return [why for why, prediction in variants.items() if evidence.has(prediction)]


def ties_at_zero(evidence: Evidence) -> list[str]:
    """A ReLU's gradient at 0: the gradient differs although the forward pass is equal."""
    block = re.match(r"layer\d+\.\d+", evidence.module)
    outputs = evidence.standard["forward"]
    ties = int((outputs[block[0]] == 0).sum()) if block else 0
    return [f"the gradient of a ReLU at exactly 0 ({ties:,} zeros in {block[0]})"] if ties else []
