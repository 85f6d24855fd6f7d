"""In which order a stream has its examples: shuffled thoroughly, or by shards."""

import functools
from typing import Literal

import grain
import numpy as np

Shuffle = Literal["thorough", "within-shards", "shards-only"]
"""What each epoch shuffles: all examples, or shards of them that follow each other.

Examples are dealt into shards once, as they are written to files. In each epoch the
shards come in another order; "within-shards" shuffles the inside of each too, while
"shards-only" reads it as it was written, so that the same examples always meet in a
batch. (Ioffe & Szegedy 2015, section 4.2.1: shuffling within shards, against not doing
so, brought about 1 % of accuracy.)
"""
EPOCHS = 10**6  # more than anyone trains; of an endless stream, batches of 1 overflow
SHARD_SIZE = 1024  # examples; of ImageNet that makes 1,252 files, about as it is stored


def stream(
    count: int, seed: int, shuffle: Shuffle, shard_size: int
) -> grain.MapDataset:
    """The numbers 0 to `count` - 1, epoch after epoch."""
    if shuffle == "thorough":
        return grain.MapDataset.range(count).seed(seed).shuffle().repeat(EPOCHS)
    within = shuffle == "within-shards"
    look = functools.partial(_at, seed, count, shard_size, within)
    return grain.MapDataset.range(count * EPOCHS).seed(seed).map(look)


@functools.lru_cache(maxsize=4)  # epochs that threads read at the same time
def order(seed: int, count: int, size: int, within: bool, epoch: int) -> np.ndarray:
    """The examples of an epoch, shard after shard.

    Args:
        seed: of the dealing and of the order.
        count: of all examples.
        size: of a shard; the last may have fewer.
        within: whether shards are shuffled inside.
        epoch: from 0 on.
    """
    dealt = np.random.default_rng((seed, 0)).permutation(count)
    shards = np.split(dealt, range(size, count, size))
    random = np.random.default_rng((seed, 1, epoch))
    turn = [shards[index] for index in random.permutation(len(shards))]
    return np.concatenate([random.permutation(s) if within else s for s in turn])


def _at(seed: int, count: int, size: int, within: bool, position: int) -> int:
    epoch, place = divmod(position, count)
    return int(order(seed, count, size, within, epoch)[place])
