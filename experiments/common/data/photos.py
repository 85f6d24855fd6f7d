"""ImageNet as a source of examples, from folders of photographs or from record files.

Nothing is downloaded: ImageNet may only be had from image-net.org or Kaggle, on their
terms. Any other photographs in one of its layouts will do; see `folders` and `records`.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.data import decoding, folders, records
from experiments.common.data.distortions import Strength
from experiments.common.data.examples import Batch
from experiments.common.data.folders import Encoded
from experiments.common.data.idx import VARIABLE, DataError

PATIENCE = 100  # damaged files in a row, after which something else is wrong


class Splits(NamedTuple):
    """The images of both splits as they are stored, and how many classes they have."""

    train: Sequence[Encoded]
    test: Sequence[Encoded]
    classes: int


class Photos:
    """Photographs, cropped to one size.

    A training image that cannot be decoded is replaced by the next one that can be, so
    that the stream remains a function of seed and position; a test image, by an empty
    one with label -1, so that none counts twice. A warning names each, once a process.
    """

    def __init__(self, splits: Splits, size: int = 224, colours: Strength = "weak"):
        """
        Args:
            splits: the images.
            size: of the crops.
            colours: how much those of training images are changed.
        """
        self._train, self._test, self.classes = splits
        self.train_count, self.test_count = len(self._train), len(self._test)
        self.shape = size, size, 3
        self._colours: Strength = colours
        self._named: dict[str, object] = {}

    def training_example(self, index: int, rng: np.random.Generator) -> Batch:
        """A random crop, mirrored or not, its colours changed.

        Raises:
            DataError: neither this image nor any of those after it can be decoded.
        """
        name = ""
        for number in range(index, index + min(PATIENCE, self.train_count)):
            content, label, name = self._train[number % self.train_count]
            try:
                image = decoding.training(content, rng, self.shape[0], self._colours)
            except decoding.Undecodable as error:
                self._warn(name, error, "the next image takes its place")
            else:
                return Batch(image, np.array(label, np.int32))
        raise DataError(
            f"{PATIENCE} training images in a row, or all, cannot be decoded, the last "
            f"of them {name}: expected JPEG or PNG files. See how they were copied."
        )

    def test_example(self, index: int) -> Batch:
        """The middle of an image."""
        content, label, name = self._test[index]
        try:
            image = decoding.validation(content, self.shape[0])
        except decoding.Undecodable as error:
            self._warn(name, error, "no prediction for it is right")
            return Batch(np.zeros(self.shape, np.uint8), np.array(-1, np.int32))
        return Batch(image, np.array(label, np.int32))

    def _warn(self, name: str, error: Exception, then: str) -> None:
        mine = object()
        if self._named.setdefault(name, mine) is mine:  # of all threads, in one
            text = f"{name} cannot be decoded ({error}): it is left out, and {then}."
            warnings.warn(text, stacklevel=3)


def load(
    data_dir: Path | None = None, *, size: int = 224, colours: Strength = "weak"
) -> Photos:
    """The photographs below a folder, as a source.

    Args:
        data_dir: see `splits`.
        size: of the crops.
        colours: how much those of training images are changed.

    Raises:
        DataError: it is no folder in the layout of ImageNet.
    """
    return Photos(splits(data_dir), size, colours)


def splits(data_dir: Path | None = None) -> Splits:
    """The photographs below a folder in the layout of ImageNet.

    Args:
        data_dir: with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or with record files;
            None: $BNJAX_DATA.

    Raises:
        DataError: it is no such folder.
    """
    if data_dir is None and os.environ.get(VARIABLE):
        data_dir = Path(os.environ[VARIABLE])
    if data_dir is None or not data_dir.is_dir():
        raise DataError(
            f"received {data_dir} for the folder of ImageNet: expected one that is "
            f"there, as nothing is downloaded. Name it by --data-dir or {VARIABLE}."
        )
    found = records.open_splits(data_dir) or folders.open_splits(data_dir)
    return Splits(*found)
