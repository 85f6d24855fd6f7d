"""NNX layers: variables around the pure functions, and no arithmetic.

`BatchNorm` has the name, the arguments, the variables and the views of
`flax.nnx.BatchNorm`. Every layer has the outputs of its namesake in `bnjax.linen`, to
the bit.
"""

from bnjax._replacement import Replacement
from bnjax.nnx._batch_norm import BatchMoments, BatchNorm, freeze
from bnjax.nnx._replace import replace_batch_norm, restore_batch_norm
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
    "Replacement",
    "SplitBatchNorm",
    "freeze",
    "replace_batch_norm",
    "restore_batch_norm",
]
