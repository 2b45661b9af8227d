"""Faults of an optimizer's first step, which begins with an empty state."""

import numpy as np

from equivalence_tests.parity.causes.evidence import Evidence, constant, same
from flax_resnet.config import OptimizerConfig


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
        "eps is added under RMSprop's root": _rms_direction(step),
        # Optax scales by -lr, so the sign of the buffer changes too.
        "the learning rate goes into RMSprop's momentum": -step.rule.lr * evidence.expected,
    }
    return _predicting(evidence, variants)


def _rms_direction(step: FirstStep) -> np.ndarray:
    """RMSprop's direction with eps under the root."""
    square = step.state("square_avg")
    if step.rule.centered:
        square = square - np.square(step.state("grad_avg"))
    return step.gradient() / np.sqrt(square + step.rule.eps)


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
