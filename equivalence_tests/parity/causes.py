"""Likely causes of a first divergence.

For each known fault, the faulty result is computed from arrays that are still equal on both sides.
A fault is a cause if its result equals what the faulty side has.
"""

import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from equivalence_tests.parity.engine import Row, Trace
from equivalence_tests.parity.inputs import Case
from flax_resnet.config import OptimizerConfig

SAME = 1e-9
"""Largest relative difference between a predicted array and an equal one: far above rounding, far
below every fault."""


def module_of(row: Row) -> str:
    """Name of the layer that a tensor belongs to."""
    name = row.name.split(" ")[0].split(":")[0]
    if row.phase == "forward":
        return name
    return name.rpartition(".")[0]


def causes(row: Row, subject: Trace, standard: Trace, case: Case) -> list[str]:
    """Known faults that predict the subject's array, one sentence each."""
    evidence = Evidence(row, subject, standard, case)
    found = []
    for explain in EXPLANATIONS.get(row.phase, ()):
        try:
            found += explain(evidence)
        except (KeyError, RuntimeError, StopIteration, ValueError):
            continue  # this fault does not apply to such arrays
    return found


class Evidence:
    """Evidence available to an explanation."""

    def __init__(self, row: Row, subject: Trace, standard: Trace, case: Case):
        self.row, self.subject, self.standard, self.case = row, subject, standard, case
        self.module = module_of(row)
        self.got = np.asarray(subject[row.phase][row.name], np.float64)
        self.expected = np.asarray(standard[row.phase][row.name], np.float64)

    def weights(self, leaf: str) -> np.ndarray:
        """An array of the module's state before the step."""
        return np.asarray(self.case.arrays[f"{self.module}.{leaf}"], np.float64)

    def statistic(self, leaf: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A running statistic of the module: before the step, in subject, in standard."""
        name = f"{self.module}.{leaf}"
        sources = self.case.arrays, self.subject["batch_norm"], self.standard["batch_norm"]
        before, got, expected = (np.asarray(source[name], np.float64) for source in sources)
        return before, got, expected

    def has(self, prediction) -> bool:
        """True if the subject's array equals the prediction."""
        return same(prediction, self.got)

    def inputs(self) -> Iterator[np.ndarray]:
        """Candidates for the module's input: earlier activations [B, C, H, W], nearest first, each
        without and with a ReLU; then the images."""
        names = list(self.standard["forward"])
        for name in reversed(names[: names.index(self.row.name)]):
            activation = np.array(self.standard["forward"][name])  # JAX's arrays are read-only
            yield from (activation, np.maximum(activation, 0))
        yield self.case.images[-1].transpose(0, 3, 1, 2).astype(np.float64)


def same(a, b) -> bool:
    """True if two arrays are equal up to rounding."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and np.linalg.norm(a - b) <= SAME * np.linalg.norm(b)


def constant(values, spread=1e-6, noise=0.0) -> float | None:
    """The value of an array whose elements are all equal, or None.

    Args:
      spread: relative differences to ignore.
      noise: absolute differences to ignore, for a value that may be 0.
    """
    values = np.asarray(values, np.float64)
    middle = float(np.median(values))
    return middle if np.abs(values - middle).max() <= spread * abs(middle) + noise else None


# --- batch_norm ---


def moved_by(evidence: Evidence) -> list[str]:
    """Another momentum of the running statistics, a biased variance, or both.

    The running mean shows the momentum. With that known, the running variance shows the factor of
    the batch variance, so two faults at once are distinguished.
    """
    if not evidence.row.name.endswith(("running_mean", "running_var")):
        return []
    share = _share_of_the_way(evidence)
    found = [] if share is None else [*_other_share(evidence, share), *_biased(evidence, share)]
    return [" and ".join(found)] if found else []


def _share_of_the_way(evidence: Evidence) -> float | None:
    """Change of the module's running mean relative to PyTorch's change; None if not constant."""
    old, got, expected = evidence.statistic("running_mean")
    return constant((got - old) / (expected - old))


def _other_share(evidence: Evidence, share: float) -> list[str]:
    if abs(share - 1) < 1e-6:
        return []
    if abs(share) < 1e-9:
        return ["momentum is 0: running statistics never move"]
    batches = evidence.case.arrays[f"{evidence.module}.num_batches_tracked"] + 1
    if abs(share - 10 / batches) < 1e-9:
        return ["running statistics are means over all batches (momentum=None)"]
    known = " (Flax's default, 0.99)" if abs(share - 0.1) < 1e-6 else ""
    return [f"momentum is {0.1 * share:.4g} instead of 0.1{known}"]


def _biased(evidence: Evidence, share: float) -> list[str]:
    n = biased_count(*evidence.statistic("running_var"), 0.1, share)
    return [f"running_var ratio is (n - 1) / n with n = {n}: biased variance"] if n else []


def biased_count(old, got, expected, momentum: float, share: float) -> int | None:
    """The n of a biased variance: batch variances that differ by (n - 1) / n, n a whole number.

    Args:
      old, got, expected: the running variance before the step, and after it on both sides.
      momentum: PyTorch's.
      share: how far the statistics moved, relative to PyTorch's.

    Returns:
      n; None if the variances differ in another way, or not at all.
    """
    if not share:
        return None
    of_jax, of_torch = old + (got - old) / (momentum * share), old + (expected - old) / momentum
    ratio = constant(of_jax / of_torch)
    if ratio is None or not 0.4 < ratio < 1 - 1e-9:
        return None
    n = 1 / (1 - ratio)
    return round(n) if abs(n - round(n)) <= 1e-3 * n else None


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
    """A ReLU's gradient at 0: the gradient differs although the forward pass is equal."""
    block = re.match(r"layer\d+\.\d+", evidence.module)
    outputs = evidence.standard["forward"]
    ties = int((outputs[block[0]] == 0).sum()) if block else 0
    return [f"the gradient of a ReLU at exactly 0 ({ties:,} zeros in {block[0]})"] if ties else []


# --- optimizer, parameters: the first step, from an empty optimizer state ---


class FirstStep:
    """The first step of one parameter, by the definitions of torch.optim."""

    def __init__(self, evidence: Evidence, name: str):
        if len(evidence.case.images) > 1:
            raise ValueError("more than one step")
        self.rule = OptimizerConfig(**evidence.case.rule)
        self.name, self.evidence = name, evidence
        self.old = np.asarray(evidence.case.arrays[name], np.float64)

    @property
    def norm(self) -> float:
        """Norm of all gradients together."""
        gradients = self.evidence.standard["gradient"]
        parameters = [g for name, g in gradients.items() if name in self.evidence.case.arrays]
        return float(np.sqrt(sum(np.square(np.float64(g)).sum() for g in parameters)))

    def gradient(self, scale=None) -> np.ndarray:
        """The gradient times `scale` (None: norm clipping), plus weight decay unless decoupled."""
        if scale is None:
            most = self.rule.clip_norm
            scale = min(1.0, most / (self.norm + 1e-6)) if most else 1.0
        decoupled = self.rule.decoupled_weight_decay or self.rule.optimizer == "adamw"
        decay = 0.0 if decoupled else self.rule.weight_decay
        return scale * self.evidence.standard["gradient"][self.name] + decay * self.old

    def state(self, kind: str) -> np.ndarray:
        return np.asarray(self.evidence.standard["optimizer"][f"{self.name} {kind}"], np.float64)


def _predicting(evidence: Evidence, variants: dict[str, np.ndarray], origin=0.0) -> list[str]:
    """Names of the variants that equal the subject's array, both measured from `origin`."""
    got = evidence.got - origin
    return [why for why, prediction in variants.items() if same(prediction - origin, got)]


def other_momentum(evidence: Evidence) -> list[str]:
    """Faults of what SGD adds to its momentum buffer."""
    name, _, kind = evidence.row.name.partition(" ")
    step = FirstStep(evidence, name)
    if kind != "momentum_buffer" or step.rule.optimizer != "sgd":
        return []
    plain = evidence.standard["gradient"][name]
    variants = {
        "weight decay is not in the gradient (decoupled, or this parameter is spared)": plain,
        "gradients enter the momentum times 1 - momentum": (1 - step.rule.momentum)
        * evidence.expected,
    }
    if step.rule.clip_norm:
        shrunk = min(1.0, step.rule.clip_norm / step.norm)
        variants |= {
            "gradients are clipped by max / norm, without torch's 1e-6": step.gradient(shrunk),
            "gradients are not clipped": step.gradient(1.0),
        }
    return _predicting(evidence, variants)


def other_average(evidence: Evidence) -> list[str]:
    """Another decay rate of the averages of gradients or of squared gradients."""
    name, _, kind = evidence.row.name.partition(" ")
    rule = FirstStep(evidence, name).rule
    options = {"exp_avg": "beta1", "exp_avg_sq": "beta2", "square_avg": "alpha"}
    ratio = constant(evidence.got / evidence.expected)
    if kind not in options or ratio is None:
        return []
    usual = getattr(rule, options[kind])
    return [f"{options[kind]} is {1 - ratio * (1 - usual):.4g} instead of {usual:g}"]


def other_direction(evidence: Evidence) -> list[str]:
    """Faults of what RMSprop adds to its momentum buffer."""
    name, _, kind = evidence.row.name.partition(" ")
    step = FirstStep(evidence, name)
    if kind != "momentum_buffer" or step.rule.optimizer != "rmsprop":
        return []
    variants = {
        "eps is added under RMSprop's root": _rms_direction(step, eps_in_root=True),
        # Optax scales by -lr, so the sign of the buffer changes too.
        "the learning rate goes into RMSprop's momentum": -step.rule.lr * evidence.expected,
    }
    return _predicting(evidence, variants)


def _rms_direction(step: FirstStep, *, eps_in_root=False) -> np.ndarray:
    square, eps = step.state("square_avg"), step.rule.eps
    if step.rule.centered:
        square = square - np.square(step.state("grad_avg"))
    root = np.sqrt(square + eps) if eps_in_root else np.sqrt(square) + eps
    return step.gradient() / root


def other_sgd_step(evidence: Evidence) -> list[str]:
    """Faults of SGD's step from its momentum buffer."""
    step = FirstStep(evidence, evidence.row.name)
    if step.rule.optimizer != "sgd":
        return []
    buffer, rate = step.state("momentum_buffer"), step.rule.lr
    variants = {
        "momentum is plain instead of Nesterov's": step.old - rate * buffer,
        "momentum is Nesterov's instead of plain": step.old
        - rate * (1 + step.rule.momentum) * buffer,
    }
    return _predicting(evidence, variants, step.old)


def other_adam_step(evidence: Evidence) -> list[str]:
    """Faults of Adam's step from its moments."""
    step = FirstStep(evidence, evidence.row.name)
    rule = step.rule
    if rule.optimizer not in ("adam", "adamw"):
        return []
    decoupled = rule.decoupled_weight_decay or rule.optimizer == "adamw"
    decay = rule.weight_decay * step.old if decoupled else 0.0

    def moved(first, second, shrunk, eps_in_root=0.0):
        root = np.sqrt(second + eps_in_root) + (0.0 if eps_in_root else rule.eps)
        return step.old - shrunk - rule.lr * first / root

    moments = step.state("exp_avg"), step.state("exp_avg_sq")
    first, second = (m / (1 - b) for m, b in zip(moments, (rule.beta1, rule.beta2), strict=True))
    narrow = (
        m / np.float64(np.float32(1) - np.float32(b))
        for m, b in zip(moments, (rule.beta1, rule.beta2), strict=True)
    )
    variants = {
        "eps is added under Adam's root": moved(first, second, rule.lr * decay, rule.eps),
        "eps squared is added under Adam's root": moved(
            first, second, rule.lr * decay, rule.eps**2
        ),
        "1 - beta^t is rounded to float32": moved(*narrow, rule.lr * decay),
        "Adam's moments are not corrected for their start at 0": moved(*moments, rule.lr * decay),
        "weight decay is not multiplied by the learning rate": moved(first, second, decay),
    }
    if not decoupled:
        del variants["weight decay is not multiplied by the learning rate"]
    return _predicting(evidence, variants, step.old)


EXPLANATIONS: dict[str, tuple[Callable[[Evidence], list[str]], ...]] = {
    "forward": (other_epsilon, other_convolution, other_pool),
    "loss": (other_loss,),
    "gradient": (ties_at_zero,),
    "batch_norm": (moved_by, not_counted),
    "optimizer": (other_momentum, other_average, other_direction),
    "parameters": (other_sgd_step, other_adam_step),
}
"""Explanations by the phase of the first divergence."""
