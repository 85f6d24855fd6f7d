"""Which examples make up the batches, and the groups that these are split into."""

from typing import Literal

import numpy as np

Order = Literal["mixed", "by class"]
Shuffling = Literal["full", "within shards", "none"]
SHARDS = 10


def draw(
    seed: int, examples: int, steps: int, size: int, shuffling: Shuffling = "full"
) -> np.ndarray:
    """Batches of examples, (step, size), epoch by epoch without replacement.

    Args:
        seed: of the order.
        examples: how many there are; the last ones of an epoch that fill no batch are
            left out.
        steps: the number of batches.
        size: of each.
        shuffling: "full": every epoch in a new order. "none": every epoch in the random
            order of the first, so that the batches are the same. "within shards": that
            order is cut into SHARDS pieces, which follow on each other in every epoch;
            each is shuffled anew.
    """
    random = np.random.default_rng(seed)
    whole = examples // size * size
    first = random.permutation(examples)[:whole]

    def epoch(number: int) -> np.ndarray:
        if number == 0 or shuffling == "none":
            return first
        if shuffling == "full":
            return random.permutation(examples)[:whole]
        shards = np.array_split(first, SHARDS)
        return np.concatenate([random.permutation(shard) for shard in shards])

    drawn = [epoch(number) for number in range(-(-steps * size // whole))]
    return np.concatenate(drawn).reshape(-1, size)[:steps]


def cover(examples: int, size: int) -> np.ndarray:
    """Batches of all examples in turn, (batch, size).

    The last one is filled up from the start, by numbers from `examples` on, which do
    not count.
    """
    batches = -(-examples // size)
    return np.arange(batches * size).reshape(batches, size)


def split(
    batches: np.ndarray, labels: np.ndarray, size: int, order: Order
) -> np.ndarray:
    """(batch, example) -> (batch, group, size): each batch as it is, or by class."""
    if order == "by class":
        classes = labels[batches % len(labels)]
        sort = np.argsort(classes, axis=1, kind="stable")
        batches = np.take_along_axis(batches, sort, axis=1)
    return batches.reshape(len(batches), -1, size)
