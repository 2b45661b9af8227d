"""State of training beside the statistics that PyTorch has, set as it is after many batches.

Haiku keeps a running average beside its corrected value and a count of batches; in evaluation only
the corrected value is read, so only that is matched. Equinox keeps a flag of the first batch.
"""

import jax.numpy as jnp
import numpy as np

from equivalence_tests.parity.ports.graph import Graph
from equivalence_tests.parity.ports.mapping import Mapping
from flax_resnet.text import listed

MANY = 10**6
"""A count of batches after which no correction for the start at zero is left."""


def settle(training: Graph, mapping: Mapping, leaves: dict) -> list[str]:
    """Fills the leaves from which training computes a statistic's next value.

    Args:
      training: JAX's graph in training mode.

    Returns:
      A remark on counts of batches, of which the first are not compared; [] if there are none.
    """
    used = {piece.leaf for parts in mapping.pieces.values() for piece in parts}
    moving = training.moved()
    flags, counts = set(), set()
    for path in used & moving:
        needed = training.leaves_above(training.after[path])
        for other in (needed & moving) - used:
            kind = jnp.result_type(leaves[other])
            if kind == np.bool_:
                flags.add(other)
            elif path in needed:
                continue
            elif np.shape(leaves[other]) == np.shape(leaves[path]):
                leaves[other] = leaves[path]
                mapping.extra.pop(other, None)
            elif jnp.issubdtype(kind, jnp.integer):
                leaves[other] = np.full_like(leaves[other], MANY)
                counts.add(other)
    for flag in flags:
        leaves[flag] = np.logical_not(leaves[flag])
    many = f"training is compared as after {MANY:,} batches, not at its start, because of"
    return [f"{many} {listed(sorted(counts))}"] if counts else []
