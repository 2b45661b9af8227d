"""Where two traces part, and why: first the phase and the module, then the likely cause.

Only arrays are looked at: the traces of both sides and the case they ran on. A cause is found by
computing what each known fault would have made of the arrays that are still equal, and comparing
that with what the faulty side has.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from equivalence_tests import tolerances
from equivalence_tests.inputs import Case
from equivalence_tests.parity import Row, Trace, compare

Verdict = Literal["equal", "rounding", "semantic"]

SAME = 1e-9
"""Relative difference below which a prediction is taken for what was found: far above rounding,
far below every fault."""


def verdict(row: Row, arch: str) -> Verdict:
    """Of one tensor in float64."""
    if row.norm_relative == 0:
        return "equal"
    within = row.norm_relative <= tolerances.float64(arch, row.phase)
    return "rounding" if within else "semantic"


class Finding(NamedTuple):
    """The first divergence."""

    phase: str

    module: str
    """Torch's name of the layer; "" for the whole (a loss, a step count)."""

    row: Row

    causes: list[str]
    """Faults that explain it, each one sentence; [] for none that is known."""


def first_divergence(subject: Trace, standard: Trace, case: Case) -> Finding | None:
    """The first tensor, in the order of a step, that rounding cannot explain.

    Args:
      subject: the side that may be wrong.
      standard: the side that follows PyTorch's definitions.
      case: what both ran on.
    """
    rows = compare(subject, standard)
    row = next((row for row in rows if verdict(row, case.arch) == "semantic"), None)
    if row is None:
        return None
    return Finding(row.phase, module_of(row), row, causes(row, subject, standard, case))


def module_of(row: Row) -> str:
    """The layer that a tensor belongs to."""
    name = row.name.split(" ")[0].split(":")[0]
    if row.phase == "forward":
        return name
    return name.rpartition(".")[0]


def causes(row: Row, subject: Trace, standard: Trace, case: Case) -> list[str]:
    """Sentences of the known faults that predict what the subject has."""
    evidence = Evidence(row, subject, standard, case)
    found = []
    for explain in EXPLANATIONS.get(row.phase, ()):
        try:
            found += explain(evidence)
        except (KeyError, RuntimeError, StopIteration, ValueError):
            continue  # this fault cannot have made such arrays
    return found


class Evidence:
    """What an explanation may look at."""

    def __init__(self, row: Row, subject: Trace, standard: Trace, case: Case):
        self.row, self.subject, self.standard, self.case = row, subject, standard, case
        self.module = module_of(row)
        self.got = np.asarray(subject[row.phase][row.name], np.float64)
        self.expected = np.asarray(standard[row.phase][row.name], np.float64)

    def weights(self, leaf: str) -> np.ndarray:
        """Of the module, before the step."""
        return np.asarray(self.case.arrays[f"{self.module}.{leaf}"], np.float64)

    def has(self, prediction) -> bool:
        """Whether the subject has just that."""
        return same(prediction, self.got)

    def inputs(self) -> Iterator[np.ndarray]:
        """What may have entered the module: equal activations [B, C, H, W] before it, as they are
        and behind a ReLU, nearest first; the images last."""
        names = list(self.standard["forward"])
        for name in reversed(names[: names.index(self.row.name)]):
            activation = np.array(self.standard["forward"][name])  # JAX's cannot be written to
            yield from (activation, np.maximum(activation, 0))
        yield self.case.images[-1].transpose(0, 3, 1, 2).astype(np.float64)


def same(a, b) -> bool:
    """Equal but for rounding."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and np.linalg.norm(a - b) <= SAME * np.linalg.norm(b)


def constant(values, spread=1e-6) -> float | None:
    """The one value that an array has throughout, or None."""
    values = np.asarray(values, np.float64)
    middle = float(np.median(values))
    return middle if np.abs(values - middle).max() <= spread * abs(middle) else None


# --- batch_norm ---


def moved_by(evidence: Evidence) -> list[str]:
    """Running statistics that went another share of the way."""
    if not evidence.row.name.endswith(("running_mean", "running_var")):
        return []
    old = np.asarray(evidence.case.arrays[evidence.row.name], np.float64)
    share = constant((evidence.got - old) / (evidence.expected - old))
    if share is None or evidence.row.name.endswith("running_var") and _is_biased(evidence, old):
        return []
    if abs(share) < 1e-9:
        return ["momentum is 0: running statistics never move"]
    if (
        abs(share - 10 / (evidence.case.arrays[f"{evidence.module}.num_batches_tracked"] + 1))
        < 1e-9
    ):
        return ["running statistics are means over all batches (momentum=None)"]
    known = " (Flax's default, 0.99)" if abs(share - 0.1) < 1e-6 else ""
    return [f"momentum is {0.1 * share:.4g} instead of 0.1{known}"]


def biased_variance(evidence: Evidence) -> list[str]:
    if not evidence.row.name.endswith("running_var"):
        return []
    old = np.asarray(evidence.case.arrays[evidence.row.name], np.float64)
    n = _is_biased(evidence, old)
    return [f"running_var ratio is (n - 1) / n with n = {n}: biased variance"] if n else []


def _is_biased(evidence, old) -> int:
    """The n by whose n / (n - 1) the variances of the batch differ, or 0."""
    ours, theirs = ((x - 0.9 * old) / 0.1 for x in (evidence.got, evidence.expected))
    ratio = constant(ours / theirs)
    if ratio is None or not 0.4 < ratio < 1:
        return 0
    n = 1 / (1 - ratio)
    return round(n) if abs(n - round(n)) < 1e-3 * n else 0


def not_counted(evidence: Evidence) -> list[str]:
    old = evidence.case.arrays[evidence.row.name]
    counts = evidence.row.name.endswith("num_batches_tracked")
    return ["batches are not counted"] if counts and (evidence.got == old).all() else []


# --- forward ---


def other_epsilon(evidence: Evidence) -> list[str]:
    """Solves a BatchNorm's output for its eps."""
    beta = evidence.weights("bias").reshape(1, -1, 1, 1)
    expected = evidence.expected - beta
    clear = np.abs(expected) > 1e-3 * np.abs(expected).max()
    ratio = [np.median(((evidence.got - beta) / expected)[:, c][clear[:, c]])
             for c in range(beta.size)]  # fmt: skip
    variance = _variance(evidence)
    epsilon = constant((variance + 1e-5) / np.square(ratio) - variance, spread=1e-3)
    if epsilon is None or epsilon < 0:
        return []
    known = " (Keras and TensorFlow)" if abs(epsilon - 1e-3) < 1e-6 else ""
    return [f"eps is {epsilon:.3g} instead of 1e-05{known} in {evidence.module}"]


def _variance(evidence) -> np.ndarray:
    """The variance that a BatchNorm divided by."""
    name = f"{evidence.module}.running_var"
    old = np.asarray(evidence.case.arrays[name], np.float64)
    if "batch_norm" not in evidence.standard:
        return old
    n = evidence.expected.size / evidence.expected.shape[1]
    return (evidence.standard["batch_norm"][name] - 0.9 * old) / 0.1 * (n - 1) / n


def other_convolution(evidence: Evidence) -> list[str]:
    """Recomputes a convolution as each fault would have it."""
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
    return _convolution(_padded_same(x, kernel.shape[2], stride, 0.0), kernel, stride, 0)


def _padded_same(x, window, stride, value):
    pads = []
    for size in reversed(x.shape[2:]):
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def _tf32(x):
    bits = x.float().numpy().view(np.uint32)
    rounded = (bits + np.uint32(0xFFF) + ((bits >> 13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return torch.from_numpy(rounded.view(np.float32)).double()


def _interleaved(x, kernel, stride):
    out, groups = _convolution(x, kernel, stride), x.shape[1] // kernel.shape[1]
    batch, channels, *size = out.shape
    return out.view(batch, groups, -1, *size).transpose(1, 2).reshape(batch, channels, *size)


CONVOLUTIONS: dict[str, Callable] = {
    "the kernel's height and width are swapped": lambda x, k, s: _convolution(
        x, k.transpose(2, 3), s
    ),
    'padding is "SAME", which is lopsided at stride 2': _same_padding,
    "operands are rounded to TF32": lambda x, k, s: _convolution(_tf32(x), _tf32(k), s),
    "groups are interleaved": _interleaved,
    "the stride is another": lambda x, k, s: _convolution(x, k, 3 - s),
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
        'the max-pool pads "SAME"': F.max_pool2d(_padded_same(x, 3, 2, -np.inf), 3, 2),
        "the max-pool has no padding": F.max_pool2d(x, 3, 2),
        "it is an average pool": F.avg_pool2d(x, 3, 2, 1),
    }
    return [why for why, prediction in variants.items() if evidence.has(prediction)]


# --- loss, gradient ---


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
    """A gradient that differs although the forward pass is equal."""
    block = re.match(r"layer\d+\.\d+", evidence.module)
    outputs = evidence.standard["forward"]
    ties = int((outputs[block[0]] == 0).sum()) if block else 0
    return [f"the gradient of a ReLU at exactly 0 ({ties:,} zeros in {block[0]})"] if ties else []


# --- optimizer, parameters ---


def other_buffer(evidence: Evidence) -> list[str]:
    """What entered SGD's momentum."""
    name, _, kind = evidence.row.name.partition(" ")
    if kind != "momentum_buffer" or len(evidence.case.images) > 1:
        return []
    gradient = evidence.standard["gradient"][name]
    momentum = evidence.case.rule.get("momentum", 0.9)
    without_decay = "weight decay is not in the gradient (decoupled, or this parameter is spared)"
    variants = {
        without_decay: gradient,
        "gradients enter the momentum times 1 - momentum": (1 - momentum) * evidence.expected,
    }
    return [why for why, prediction in variants.items() if evidence.has(prediction)]


def other_update(evidence: Evidence) -> list[str]:
    """How SGD's buffer became a step."""
    name, rule = evidence.row.name, {"lr": 0.04, "momentum": 0.9} | evidence.case.rule
    if rule.get("optimizer", "sgd") != "sgd":
        return []
    buffer = evidence.standard["optimizer"][f"{name} momentum_buffer"]
    old = np.asarray(evidence.case.arrays[name], np.float64)
    variants = {
        "momentum is plain instead of Nesterov's": old - rule["lr"] * buffer,
        "momentum is Nesterov's instead of plain": old
        - rule["lr"] * (1 + rule["momentum"]) * buffer,
    }
    single = len(evidence.case.images) == 1
    return [why for why, prediction in variants.items() if single and evidence.has(prediction)]


EXPLANATIONS: dict[str, tuple[Callable[[Evidence], list[str]], ...]] = {
    "forward": (other_epsilon, other_convolution, other_pool),
    "loss": (other_loss,),
    "gradient": (ties_at_zero,),
    "batch_norm": (moved_by, biased_variance, not_counted),
    "optimizer": (other_buffer,),
    "parameters": (other_update,),
}
"""By the phase that diverges first."""
