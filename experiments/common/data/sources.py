"""The data sets of images by name, as sources of examples."""

from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from experiments.common.data import cifar, photos
from experiments.common.data.examples import Batch, ImageData, Source


@overload
def load(
    name: Literal["digits", "cifar10"], data_dir: Path | None = None
) -> ImageData: ...
@overload
def load(name: str, data_dir: Path | None = None) -> Source: ...
def load(name: str, data_dir: Path | None = None) -> Source:
    """The data set `name`: "digits", "cifar10" or "imagenet".

    Raises:
        idx.DataError: files are missing, altered, or cannot be downloaded.
    """
    if name == "digits":
        return _digits()
    if name == "imagenet":
        return photos.load(data_dir)
    *train, images, labels = cifar.load(data_dir)
    return ImageData(Batch(*train), Batch(images, labels), padding=4, flip=True)


def _digits() -> ImageData:
    """1,797 digits of 8x8 pixels, in a fixed random order."""
    from sklearn.datasets import load_digits  # slow to import; only needed here

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] * 15).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = digits.target[order].astype(np.int32)
    train, test = (
        Batch(images[:1397], labels[:1397]),
        Batch(images[1397:], labels[1397:]),
    )
    return ImageData(train, test, padding=1, flip=False)
