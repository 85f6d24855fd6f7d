"""What a pipeline reads from: examples by number."""

from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from experiments.common.data import distortions


class Batch(NamedTuple):
    """Images (n, height, width, channels), uint8; labels (n,), int32.

    A single example is one of both without the first axis.
    """

    images: np.ndarray
    labels: np.ndarray


class Source(Protocol):
    """Two disjoint splits of examples; several threads may ask for them at a time."""

    @property
    def train_count(self) -> int:
        """How many training examples there are."""
        ...

    @property
    def test_count(self) -> int:
        """How many test examples there are."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    @property
    def classes(self) -> int:
        """How many labels there are; they run from 0."""
        ...

    def training_example(self, index: int, rng: np.random.Generator) -> Batch:
        """One training example, augmented as `rng` has it, and by nothing else."""
        ...

    def test_example(self, index: int) -> Batch:
        """One test example; a label of -1 equals no prediction."""
        ...


class ImageData(NamedTuple):
    """A source in memory: two disjoint splits, and how training images are augmented.

    Attributes:
        train: the training images.
        test: the test images.
        padding: of the borders that crops of the first size are then taken from.
        flip: whether half of the images are mirrored.
        colours: how much brightness, contrast and saturation are changed then.
    """

    train: Batch
    test: Batch
    padding: int
    flip: bool
    colours: distortions.Strength = "none"

    @property
    def train_count(self) -> int:
        return len(self.train.labels)

    @property
    def test_count(self) -> int:
        return len(self.test.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    @property
    def classes(self) -> int:
        return 1 + max(int(split.labels.max()) for split in (self.train, self.test))

    def training_example(self, index: int, rng: np.random.Generator) -> Batch:
        """Crops and mirrors an image, and changes its colours."""
        image = self.train.images[index]
        height, width, channels = image.shape
        p = self.padding
        top, left, mirror = rng.integers((2 * p + 1, 2 * p + 1, 2))
        padded = np.zeros((height + 2 * p, width + 2 * p, channels), image.dtype)
        padded[p : p + height, p : p + width] = image
        image = padded[top : top + height, left : left + width]
        if self.flip and mirror:
            image = image[:, ::-1]
        if self.colours != "none":
            pixels = Image.fromarray(image.squeeze(2) if channels == 1 else image)
            changed = distortions.photometric(pixels, rng, self.colours)
            image = np.asarray(changed).reshape(image.shape)
        return Batch(image, self.train.labels[index])

    def test_example(self, index: int) -> Batch:
        return Batch(self.test.images[index], self.test.labels[index])
