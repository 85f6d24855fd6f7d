"""The Inception network of the batch normalization paper, at full size and narrow.

References: Ioffe & Szegedy 2015, appendix (figure 5); Szegedy et al. 2014 (the
original, with local response normalization and dropout).
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.common.models.convolutions import Convolution, Style, pool
from experiments.common.models.lrn import local_response_norm


class Widths(NamedTuple):
    """Of one module: four branches, whose outputs are put side by side.

    Attributes:
        one: features of a 1x1 convolution; 0: there is none.
        three: of a 1x1 and the 3x3 convolution after it.
        double: of a 1x1 and the two 3x3 convolutions after it.
        pool: what is taken of windows of 3x3.
        projection: features of the 1x1 convolution after that; 0: there is none, and
            the module's last convolutions and its pooling have stride 2.
    """

    one: int
    three: tuple[int, int]
    double: tuple[int, int]
    pool: Literal["mean", "max"]
    projection: int


MODULES = {
    "3a": Widths(64, (64, 64), (64, 96), "mean", 32),
    "3b": Widths(64, (64, 96), (64, 96), "mean", 64),
    "3c": Widths(0, (128, 160), (64, 96), "max", 0),
    "4a": Widths(224, (64, 96), (96, 128), "mean", 128),
    "4b": Widths(192, (96, 128), (96, 128), "mean", 128),
    "4c": Widths(160, (128, 160), (128, 160), "mean", 96),
    "4d": Widths(96, (128, 192), (160, 192), "mean", 96),
    "4e": Widths(0, (128, 192), (192, 256), "max", 0),
    "5a": Widths(352, (192, 320), (160, 224), "mean", 128),
    "5b": Widths(352, (192, 320), (192, 224), "max", 128),
}
"""Figure 5."""


class Module(nn.Module):
    """One Inception module."""

    widths: Widths
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(x, name, features, kernel, strides=1):
            layer = Convolution(features, kernel, self.style, strides, name=name)
            return layer(x, train)

        one, three, double, kind, projection = self.widths
        strides = 1 if projection else 2
        branches = [conv(x, "one", one, 1)] if one else []
        y = conv(x, "three_reduce", three[0], 1)
        branches.append(conv(y, "three", three[1], 3, strides))
        y = conv(x, "double_reduce", double[0], 1)
        y = conv(y, "double_1", double[1], 3)
        branches.append(conv(y, "double_2", double[1], 3, strides))
        y = pool(x, kind, strides)
        branches.append(conv(y, "projection", projection, 1) if projection else y)
        return jnp.concatenate(branches, -1)


class Inception(nn.Module):
    """A stem, modules, the mean over space, dropout, a matrix.

    Attributes:
        style: of all convolutions.
        modules: names of `MODULES`, in this order.
        small: whether images are small, as CIFAR's: the stem is 3x3, and halves them
            once, not three times.
        lrn: whether the stem normalizes local responses.
        dropout: the share of features that are dropped before the matrix.
        classes: the number of logits.
    """

    style: Style = Style()
    modules: tuple[str, ...] = tuple(MODULES)
    small: bool = False
    lrn: bool = False
    dropout: float = 0.0
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits, float32.

        Args:
            x: (batch, height, width, channels), uint8.
            train: whether to drop features, to normalize by the batch, and to update
                the running statistics; if so, with an rng "dropout".
        """
        x = (x.astype(self.style.dtype) - 127.5) / 64
        kernel, strides = (3, 1) if self.small else (7, 2)
        x = Convolution(64, kernel, self.style, strides, name="1")(x, train)
        x = x if self.small else pool(x, "max", 2)
        x = local_response_norm(x) if self.lrn else x
        x = Convolution(64, 1, self.style, name="2_reduce")(x, train)
        x = Convolution(192, 3, self.style, name="2")(x, train)
        x = local_response_norm(x) if self.lrn else x
        x = pool(x, "max", 2)
        for name in self.modules:
            x = Module(MODULES[name], self.style, name=name)(x, train)
        x = x.mean((1, 2), dtype=jnp.float32)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="matrix")(x)
