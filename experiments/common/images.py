"""Labelled images: scikit-learn's digits, and data sets of the Hugging Face hub."""

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
}


class DataError(Exception):
    """A data set is missing or incomplete; the message says what to do."""


class Split(NamedTuple):
    """Images of one size and their classes.

    Attributes:
        images: (n, height, width, channels), uint8.
        labels: (n,), int32.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint splits; `validation` is a part of the training images."""

    train: Split
    validation: Split
    test: Split


def load(name: str, data_dir: Path | None = None) -> tuple[Split, Split]:
    """The training and the test images of a data set.

    Args:
        name: "digits", which scikit-learn contains, or a name of `HUB`.
        data_dir: the folder of a local copy, in a layout that `datasets.load_dataset`
            reads: Parquet files whose names begin with the split (train-0.parquet), or
            images in train/class/ and test/class/. None downloads from the hub, once.

    Raises:
        DataError: the data set cannot be read.
    """
    if name == "digits":
        return _digits()
    import datasets  # slow to import, and not needed for the digits

    datasets.disable_progress_bars()
    source = HUB[name] if data_dir is None else str(data_dir)
    try:
        found = datasets.load_dataset(source)
        return _read(found["train"]), _read(found["test"])
    except Exception as error:  # of many packages: network, files, Parquet
        raise DataError(
            f"{name} cannot be read from {source}: {type(error).__name__}: {error}. "
            "Expected the splits train and test, as Parquet files or folders of "
            "images; name their folder by --data-dir."
        ) from error


def binary(train: Split, test: Split) -> tuple[Split, Split]:
    """Pixels 1 where they reach half of the largest training pixel, 0 elsewhere."""
    half = train.images.max() / 2
    first, last = (
        Split((split.images >= half).astype(np.uint8), split.labels)
        for split in (train, test)
    )
    return first, last


def hold_out(train: Split, test: Split, count: int) -> Dataset:
    """Takes the last `count` training images for validation."""
    kept = len(train.labels) - count
    training = Split(train.images[:kept], train.labels[:kept])
    validation = Split(train.images[kept:], train.labels[kept:])
    return Dataset(training, validation, test)


def draw_batches(seed: int, examples: int, steps: int, size: int) -> np.ndarray:
    """Which examples are in each batch: (step, size).

    Every epoch has a new order; the last examples, which fill no batch, are left out.
    """
    random = np.random.default_rng(seed)
    whole = examples // size * size
    epochs = -(-steps * size // whole)
    drawn = [random.permutation(examples)[:whole] for _ in range(epochs)]
    return np.concatenate(drawn).reshape(-1, size)[:steps]


def _read(rows) -> Split:
    """All images of one split; damaged ones are reported and left out."""
    import datasets
    from PIL import Image

    kinds = {type(feature): name for name, feature in rows.features.items()}
    image = kinds[datasets.Image]
    images, labels = [], []
    for row in rows.cast_column(image, datasets.Image(decode=False)):
        try:
            stored = row[image]["bytes"] or Path(row[image]["path"]).read_bytes()
            pixels = np.asarray(Image.open(io.BytesIO(stored)))
        except (OSError, SyntaxError) as error:  # what Pillow raises on a damaged file
            warnings.warn(f"left out {row[image]['path']}: {error}", stacklevel=3)
            continue
        images.append(pixels)
        labels.append(row["label"])
    stacked = np.stack(images)
    stacked = stacked if stacked.ndim == 4 else stacked[..., None]
    return Split(stacked, np.array(labels, np.int32))


def _digits() -> tuple[Split, Split]:
    """1,797 digits of 8x8 pixels from 0 to 16, in a fixed random order."""
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = digits.images[order][..., None].astype(np.uint8)
    labels = digits.target[order].astype(np.int32)
    return Split(images[:1397], labels[:1397]), Split(images[1397:], labels[1397:])
