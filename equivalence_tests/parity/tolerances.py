"""Every tolerance of the comparison, with its reason.

All are relative errors of one tensor: the norm of the difference over the norm of the reference.
A semantic difference is one of definition, larger than rounding. An ulp (unit in the last place)
is the distance between neighbouring floating-point numbers.
"""

import re

import numpy as np


def relative_error(got, reference) -> float:
    """Norm of the difference over the norm of the reference, in float64; arrays of one shape."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(got - reference) / max(np.linalg.norm(reference), 1e-300))


def largest_error(got: dict, reference: dict) -> float:
    """The largest `relative_error` over arrays by name; NaN if an array contains NaN."""
    assert got.keys() == reference.keys()
    return float(np.max([relative_error(got[name], reference[name]) for name in reference]))


FORWARD = 1e-11
"""Float64: activations, loss and BatchNorm statistics. Rounding gives 1e-15 to 1e-12 in all 16
networks; the smallest known semantic difference in a forward pass is 1e-6."""

DEEP = 50
"""Number of layers above which BACKWARD_DEEP applies."""

BACKWARD = 1e-11
"""Float64: gradients, optimizer state and parameters after a step."""

BACKWARD_DEEP = 1e-10
"""BACKWARD for networks of more than 50 layers: rounding grows with depth, to 1.4e-11 in resnet152
on some inputs."""

TRAJECTORY = 1e-11
"""Float64: parameters after 20 steps at a learning rate of 1e-3, where training does not amplify
rounding. At 0.05 it does, to 1e-9 after 20 steps."""

RULES = 1e-12
"""Float64: optimizers, schedules and losses tested alone. Each element takes a few operations, over
at most a few hundred steps."""

BUDGET_FACTOR = 2
BUDGET_ULPS = 4
"""Float32 and bfloat16: error <= 2 x the error of torch + 4 ulp, both errors measured against
float64. The order of a sum is free, so two correct results differ by about their own errors. The
4 ulp are for tensors that torch happens to compute exactly."""

SCALAR_BATCHES = 32
"""Batches over which the errors of a scalar are averaged (root mean square). The error on one batch
is chance; torch's may be 0."""


def float64(arch: str, phase: str) -> float:
    """The float64 tolerance of one phase of a step."""
    if phase in ("forward", "loss", "batch_norm"):
        return FORWARD
    depth = re.search(r"\d+", arch)
    return BACKWARD_DEEP if depth and int(depth[0]) > DEEP else BACKWARD


PORT = 1e-10
"""Float64: one layer of a port by itself, from equal inputs, and every tensor of a port that was
explained. Rounding gives 2e-14 in the public ResNets; the smallest fault that was met, an eps of
1.001e-5 in Keras, gives 1.0e-9."""

LOUD = 1e-8
"""Float64: one layer of a port on activations of large values. There PyTorch's softplus is its
argument, which is wrong by 1e-10 of it; a bound that one element of 10^5 reaches gives 1e-6."""

PARALLEL = 1e-11
"""Float64: one program on different numbers of devices. Only the order of summation differs."""

MEMBERS = 1e-11
"""Float64: a run that shares its program with runs of other seeds, after tens of steps."""

TRAINING = 1e-12
"""Float64: weights after 120 steps at a learning rate of 0.01. Rounding grows with every step, to a
few times 1e-15."""

TRAINING_FAST = 1e-11
"""TRAINING for a learning rate of 0.1, where rounding grows to 1e-14
(`python -m equivalence_tests.studies.trajectory`)."""
