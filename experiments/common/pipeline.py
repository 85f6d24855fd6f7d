"""Image batches by position: shuffled, augmented, alike on any number of processes.

The example at a position of the stream, and how it is augmented, follow from the seed
and that position alone. A batch is therefore reached without those before it, and is
the same, in the same order, however many processes share it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from experiments.common import cifar

EPOCHS = 10**6  # more than anyone trains; of an endless stream, batches of 1 overflow


class Batch(NamedTuple):
    """Images (n, height, width, channels), uint8; labels (n,), int32."""

    images: np.ndarray
    labels: np.ndarray


class ImageData(NamedTuple):
    """Two disjoint splits, and how training images are augmented.

    Attributes:
        train: the training images.
        test: the test images.
        padding: of the borders that crops of the first size are then taken from.
        flip: whether half of the images are mirrored.
    """

    train: Batch
    test: Batch
    padding: int
    flip: bool


def load(name: str, data_dir: Path | None = None) -> ImageData:
    """The data set `name`: "digits" or "cifar10".

    Raises:
        idx.DataError: files are missing, altered, or cannot be downloaded.
    """
    if name == "digits":
        return _digits()
    *train, images, labels = cifar.load(data_dir)
    return ImageData(Batch(*train), Batch(images, labels), padding=4, flip=True)


def training(
    data: ImageData, seed: int, batch_size: int, process: int, processes: int
) -> grain.MapDataset:
    """The share of one process in every training batch; item k is of step k.

    Each epoch is shuffled anew, and batches run on from one epoch into the next.

    Args:
        data: images and labels.
        seed: of the order and the augmentation.
        batch_size: of all processes together; a multiple of their number.
        process: which share, from 0 on.
        processes: how many there are.
    """
    examples = grain.MapDataset.range(len(data.train.labels)).seed(seed).shuffle()
    augmented = examples.repeat(EPOCHS).random_map(_Augment(data))
    return augmented.batch(batch_size // processes)[process::processes]


def from_step(batches: grain.MapDataset, step: int) -> Iterator[Batch]:
    """The batches from `step` on, read ahead by threads."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    return iter(batches[step:].to_iter_dataset(options))


def testing(
    data: ImageData, batch_size: int, process: int, processes: int
) -> list[Batch]:
    """The share of one process in the test batches; the last is filled with label -1.

    A label of -1 equals no prediction.
    """
    images, labels = data.test
    size = batch_size // processes
    shares = []
    for start in range(0, len(labels), batch_size):
        part = slice(start + process * size, start + (process + 1) * size)
        missing = size - len(labels[part])
        shares.append(
            Batch(
                np.pad(images[part], [(0, missing), (0, 0), (0, 0), (0, 0)]),
                np.pad(labels[part], (0, missing), constant_values=-1),
            )
        )
    return shares


class _Augment(grain.transforms.RandomMap):
    """Looks an example up; crops and mirrors its image."""

    def __init__(self, data: ImageData):
        self._data = data

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        image = self._data.train.images[element]
        height, width, channels = image.shape
        p = self._data.padding
        top, left, mirror = rng.integers((2 * p + 1, 2 * p + 1, 2))
        padded = np.zeros((height + 2 * p, width + 2 * p, channels), image.dtype)
        padded[p : p + height, p : p + width] = image
        image = padded[top : top + height, left : left + width]
        if self._data.flip and mirror:
            image = image[:, ::-1]
        return Batch(image, self._data.train.labels[element])


def _digits() -> ImageData:
    """1,797 digits of 8x8 pixels, in a fixed random order."""
    from sklearn.datasets import load_digits  # slow to import; only needed here

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels[order] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    train, test = (
        Batch(images[:1397], labels[:1397]),
        Batch(images[1397:], labels[1397:]),
    )
    return ImageData(train, test, padding=1, flip=False)
