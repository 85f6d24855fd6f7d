"""Linen layers: variables around the pure functions, and no arithmetic.

`BatchNorm` has the name, the fields, the variables and the errors of
`flax.linen.BatchNorm`, so that it loads Flax's checkpoints and Flax loads its own. The
variants share all of it but what their papers change.
"""

from bnjax.linen._batch_norm import BatchNorm
from bnjax.linen._variants import (
    BatchRenorm,
    DecorrelatedBatchNorm,
    GhostBatchNorm,
    SplitBatchNorm,
)

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "DecorrelatedBatchNorm",
    "GhostBatchNorm",
    "SplitBatchNorm",
]
