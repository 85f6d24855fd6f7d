"""Which examples make up the batches, and the groups that these are split into."""

from typing import Literal

import numpy as np

Order = Literal["mixed", "by class"]


def draw(seed: int, examples: int, steps: int, size: int) -> np.ndarray:
    """Batches of examples, (step, size), epoch by epoch without replacement."""
    random = np.random.default_rng(seed)
    whole = examples // size * size
    epochs = range(-(-steps * size // whole))
    drawn = [random.permutation(examples)[:whole] for _ in epochs]
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
