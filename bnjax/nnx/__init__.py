"""NNX layers: variables around the pure functions, and no arithmetic.

`BatchNorm` has the name, the arguments, the variables and the views of
`flax.nnx.BatchNorm`, and every layer the outputs of its namesake in `bnjax.linen`, to
the bit.
"""

from bnjax.nnx._batch_norm import BatchMoments, BatchNorm
from bnjax.nnx._freeze import freeze
from bnjax.nnx._variants import (
    BatchRenorm,
    DecorrelatedBatchNorm,
    GhostBatchNorm,
    SplitBatchNorm,
)

__all__ = [
    "BatchMoments",
    "BatchNorm",
    "BatchRenorm",
    "DecorrelatedBatchNorm",
    "GhostBatchNorm",
    "SplitBatchNorm",
    "freeze",
]
