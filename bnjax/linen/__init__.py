"""Linen layers: variables around the pure functions, and no arithmetic.

`BatchNorm` has the name, the fields, the variables and the errors of
`flax.linen.BatchNorm`, so that both load the checkpoints of the other. The variants
share everything with it except what their papers change.
"""

from bnjax._replacement import Replacement
from bnjax.linen._batch_norm import BatchNorm
from bnjax.linen._replace import replacing_batch_norm
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
    "Replacement",
    "SplitBatchNorm",
    "replacing_batch_norm",
]
