"""Image batches by position: shuffled, augmented, alike on any number of processes.

The example at a position of the stream, and how it is augmented, follow from the seed
and that position alone. A batch is therefore reached without those before it, and is
the same, in the same order, however many processes share it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from experiments.common import results
from experiments.common.data import shuffling
from experiments.common.data.examples import Batch, ImageData, Source
from experiments.common.data.shuffling import Shuffle

__all__ = ["Batch", "ImageData", "Source", "from_step", "testing", "training"]

THREADS = max(2, min(16, results.cores()))  # that read; each has a batch in hand


def training(
    data: Source,
    seed: int,
    batch_size: int,
    process: int,
    processes: int,
    *,
    shuffle: Shuffle = "thorough",
    shard_size: int = shuffling.SHARD_SIZE,
) -> grain.MapDataset:
    """The share of one process in every training batch; item k is of step k.

    Each epoch is shuffled anew, and batches run on from one epoch into the next.

    Args:
        data: any source of examples.
        seed: of the order and the augmentation.
        batch_size: of all processes together; a multiple of their number.
        process: which share, from 0 on.
        processes: how many there are.
        shuffle: what is shuffled; see `shuffling.Shuffle`.
        shard_size: examples in each shard, unless the shuffle is thorough.
    """
    examples = shuffling.stream(data.train_count, seed, shuffle, shard_size)
    augmented = examples.random_map(_Augment(data))
    return augmented.batch(batch_size // processes)[process::processes]


def from_step(batches: grain.MapDataset, step: int) -> Iterator[Batch]:
    """The batches from `step` on, read ahead by threads."""
    options = grain.ReadOptions(THREADS, prefetch_buffer_size=max(4, THREADS))
    return iter(batches[step:].to_iter_dataset(options))


def testing(
    data: Source, batch_size: int, process: int, processes: int
) -> Sequence[Batch]:
    """The share of one process in the test batches; the last is filled with label -1.

    They are read whenever they are asked for, and are not kept.
    """
    whole = -(-data.test_count // batch_size) * batch_size
    examples = grain.MapDataset.range(whole).map(_Test(data))
    return _Lazy(examples.batch(batch_size // processes)[process::processes])


class _Augment(grain.transforms.RandomMap):
    """Looks a training example up."""

    def __init__(self, data: Source):
        self._data = data

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        return self._data.training_example(element, rng)


class _Test(grain.transforms.Map):
    """Looks a test example up; past the last one, an empty image of no class."""

    def __init__(self, data: Source):
        self._data = data

    def map(self, element: int) -> Batch:
        if element < self._data.test_count:
            return self._data.test_example(element)
        return Batch(np.zeros(self._data.shape, np.uint8), np.array(-1, np.int32))


class _Lazy(Sequence[Batch]):
    """Batches that are made anew whenever they are asked for."""

    def __init__(self, batches: grain.MapDataset):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        batch: Any = self._batches[index]
        return batch

    def __iter__(self) -> Iterator[Batch]:
        return from_step(self._batches, 0)
