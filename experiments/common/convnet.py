"""A small convolutional network, and the images and batches that it is trained on."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from experiments.common import images
from experiments.common.images import Split

EVALUATION_BATCH_SIZE = 500


class Task(NamedTuple):
    """A data set, and the network that suits it.

    Attributes:
        widths: the number of output channels of each convolution.
        strides: the stride of each convolution.
        center: the network subtracts this from the pixels.
        spread: the network then divides the pixels by this.
        held_out: the number of training images, the last ones, for validation.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    center: float
    spread: float
    held_out: int


TASKS = {
    "digits": Task(
        widths=(16, 32, 64), strides=(2, 2, 2), center=0, spread=1, held_out=300
    ),
    "cifar10": Task(
        widths=(12, 24, 24, 48, 48, 48),
        strides=(2, 2, 1, 2, 1, 1),
        center=120,
        spread=64,
        held_out=5_000,
    ),
}


def load(name: str, data_dir: Path | None = None) -> images.Dataset:
    """The images of a task; the digits' pixels are rounded to 0 or 1.

    Args:
        name: a key of `TASKS`.
        data_dir: see `images.load`.
    """
    train, test = images.load(name, data_dir)
    if name == "digits":
        train, test = images.binary(train, test)
    return images.hold_out(train, test, TASKS[name].held_out)


class ConvNet(nn.Module):
    """Convolutions of 3x3, each with normalization and ReLU; mean; linear layer.

    Attributes:
        task: sizes, and how pixels are scaled.
        normalize: (x, train, step) -> y; it may add a layer.
        conv: (channels, size, strides=...) -> the convolution.
    """

    task: Task
    normalize: Callable[[jax.Array, bool, ArrayLike], jax.Array]
    conv: Callable[..., nn.Module] = functools.partial(nn.Conv, use_bias=False)

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool, step: ArrayLike = 0) -> jax.Array:
        """The logits of 10 classes.

        Args:
            x: (batch, height, width, colour), uint8.
            train: whether to normalize by the batch and update the running statistics.
            step: the number of the training step; only `normalize` uses it.
        """
        y = (jnp.asarray(x, jnp.float32) - self.task.center) / self.task.spread
        for width, stride in zip(self.task.widths, self.task.strides, strict=True):
            y = self.conv(width, (3, 3), strides=stride)(y)
            y = nn.relu(self.normalize(y, train, step))
        return nn.Dense(10)(y.mean((1, 2)))


def accuracy(model: nn.Module, variables: Any, data: Split) -> float:
    """The share of correctly classified images, with the running statistics."""
    right = 0
    for start in range(0, len(data.labels), EVALUATION_BATCH_SIZE):
        batch = slice(start, start + EVALUATION_BATCH_SIZE)
        classes = _classify(model, variables, data.images[batch])
        right += int((classes == data.labels[batch]).sum())
    return right / len(data.labels)


@functools.partial(jax.jit, static_argnums=0)
def _classify(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, images, train=False)
    return logits.argmax(-1)
