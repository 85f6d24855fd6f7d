"""Binary images: scikit-learn's digits and the MNIST family."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.data import idx


class Split(NamedTuple):
    """Images (n, pixels), uint8, each 0 or 1; labels (n,), int32."""

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint splits; `validation` was cut off the training set."""

    train: Split
    validation: Split
    test: Split


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The data set `name`: "digits", "mnist" or "fashion_mnist".

    Args:
        name: of the data set.
        data_dir: where its files are; see `idx.locate`. The digits need none.

    Raises:
        idx.DataError: files are missing, altered, or cannot be downloaded.
    """
    if name == "digits":
        return _digits()
    images, labels, test_images, test_labels = map(idx.read, idx.locate(name, data_dir))
    train, test = _binary(images, labels), _binary(test_images, test_labels)
    kept = len(images) * 5 // 6  # 50,000 of MNIST's 60,000
    return Dataset(_part(train, 0, kept), _part(train, kept, None), test)


def _digits() -> Dataset:
    """1,797 digits of 8x8 pixels, in a fixed random order."""
    from sklearn.datasets import load_digits  # slow to import; only needed here

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    every = _binary(digits.data[order], digits.target[order])
    return Dataset(
        _part(every, 0, 1097), _part(every, 1097, 1397), _part(every, 1397, None)
    )


def _part(split: Split, start: int, stop: int | None) -> Split:
    return Split(split.images[start:stop], split.labels[start:stop])


def _binary(images: np.ndarray, labels: np.ndarray) -> Split:
    """A pixel of at least half the largest value becomes 1, any other 0."""
    pixels = images.reshape(len(images), -1)
    return Split((pixels >= pixels.max() / 2).astype("u1"), labels.astype("i4"))
