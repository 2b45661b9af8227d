"""Every bound of the comparison, once, with its reason. All are relative: the norm of the
difference over the norm of the reference, per tensor."""

import re

import numpy as np


def relative_error(got, reference) -> float:
    """Norm of the difference over the norm of the reference, in float64; arrays of one shape."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(got - reference) / max(np.linalg.norm(reference), 1e-300))


def largest_error(got: dict, reference: dict) -> float:
    """The largest `relative_error` of arrays by name; NaN where one is no number."""
    assert got.keys() == reference.keys()
    return float(np.max([relative_error(got[name], reference[name]) for name in reference]))


FORWARD = 1e-11
"""Float64, activations, loss and BatchNorm statistics. Rounding gives 1e-15 to 1e-12 in all 16
nets; the smallest known difference of definition that a forward pass shows is 1e-6."""

DEEP = 50
"""Layers beyond which BACKWARD_DEEP holds."""

BACKWARD = 1e-11
"""Float64, gradients, optimizer state and parameters after a step."""

BACKWARD_DEEP = 1e-10
"""The same in nets of more than 50 layers: rounding grows with depth, to 1.4e-11 in resnet152 on
some inputs."""

TRAJECTORY = 1e-11
"""Float64, parameters after 20 steps at a learning rate of 1e-3, where training does not yet
amplify rounding; at 0.05 it does, 1e-9 after 20 steps."""

RULES = 1e-12
"""Float64, optimizers, schedules and losses on their own: a few operations an element, over at
most a few hundred steps."""

BUDGET_FACTOR = 2
BUDGET_ULPS = 4
"""Narrow types: error <= 2 x the error of torch + 4 ulp, both errors measured against float64. The
order of a sum is free, so two right answers differ by about their own errors; 4 ulp are for
tensors that torch happens to get exactly."""

SCALAR_BATCHES = 32
"""The error of one scalar is luck (torch's may be 0): scalars are compared by the root mean square
over this many batches."""


def float64(arch: str, phase: str) -> float:
    """The bound of one phase of a step."""
    if phase in ("forward", "loss", "batch_norm"):
        return FORWARD
    depth = re.search(r"\d+", arch)
    return BACKWARD_DEEP if depth and int(depth[0]) > DEEP else BACKWARD


# The same float64 program on another number of devices: only the order of summation differs.
PARALLEL = 1e-11

TRAINING = 1e-12
"""Float64, a training of 120 steps at a learning rate of 0.01: rounding grows with every step, to
a few times 1e-15 of the weights."""

TRAINING_FAST = 1e-11
"""The same at 0.1, where it grows to 1e-14 (`python -m equivalence_tests.studies.trajectory`)."""
