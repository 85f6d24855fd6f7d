"""What surrounds the layers in a training loop.

- `TrainState`: flax's, with batch_stats; a skipped step keeps them
- `accumulate`: gradients of micro-batches; one running update, from all of them
- `weight_decay_mask`: where weight decay applies, for optax
- `freeze_mask`: what is frozen, by patterns of paths, for optax and statistics
- `reset_batch_stats`: mean 0, variance 1
- `merge_batch_stats`: one set of running statistics from those of replicas
"""

from bnjax.training._batch_stats import (
    Accumulated,
    accumulate,
    merge_batch_stats,
    reset_batch_stats,
)
from bnjax.training._state import TrainState, freeze_mask, weight_decay_mask

__all__ = [
    "Accumulated",
    "TrainState",
    "accumulate",
    "freeze_mask",
    "merge_batch_stats",
    "reset_batch_stats",
    "weight_decay_mask",
]
