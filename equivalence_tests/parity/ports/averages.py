"""Moving averages that JAX keeps in several leaves, set so that they agree with PyTorch's one.

Haiku and Equinox keep a running average beside its corrected value and a count of batches; in
evaluation only the corrected value is read, so only that is matched.
"""

import jax.numpy as jnp
import numpy as np

from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.matching import Mapping

MANY = 10**6
"""A count of batches after which no correction for the start at zero is left."""


def settle(training: Graph, mapping: Mapping, leaves: dict):
    """Fills the leaves from which training computes a statistic's next value.

    Args:
      training: JAX's graph in training mode.
    """
    used = {piece.leaf for parts in mapping.pieces.values() for piece in parts}
    moving = {p for p, v in training.leaves.items() if training.after[p] != v}
    for path in used & moving:
        needed = training.leaves_above(training.after[path])
        if path in needed:
            continue
        for other in (needed & moving) - used:
            if np.shape(leaves[other]) == np.shape(leaves[path]):
                leaves[other] = leaves[path]
                mapping.extra.pop(other, None)
            elif jnp.issubdtype(jnp.result_type(leaves[other]), jnp.integer):
                leaves[other] = np.full_like(leaves[other], MANY)
