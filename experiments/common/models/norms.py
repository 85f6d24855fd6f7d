"""The normalizations that experiments compare, and a network that takes any of them."""

from collections.abc import Callable
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

import bnjax

AXIS = "devices"
Method = Literal[
    "batch_norm",
    "ghost",
    "frozen",
    "renorm",
    "decorrelated",
    "cross_replica",
    "group_norm",
    "layer_norm",
]
METHODS: tuple[Method, ...] = get_args(Method)
UNSPLIT: tuple[Method, ...] = ("group_norm", "layer_norm")
"""Methods to which it is nothing how a batch is split."""
ONE_CALL: tuple[Method, ...] = ("ghost", *UNSPLIT)
"""Methods that are called on a whole batch, not on each of its groups."""

Norm = Callable[[jax.Array, bool, ArrayLike], jax.Array]
Conv = Callable[..., nn.Module]


def make_norm(name: Method, size: int, steps: int, momentum: float) -> Norm:
    """(x, train, step) -> y, which adds a layer to the network that calls it.

    Args:
        name: of the method.
        size: of the groups that a batch is split into.
        steps: of the training.
        momentum: of running statistics.
    """

    def batch_norm(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.BatchNorm(not train, momentum=momentum)(x)

    def ghost(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.linen.GhostBatchNorm(
            not train, momentum=momentum, virtual_batch_size=size
        )(x)

    def renorm(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        # As in the paper, of whose 130,000 steps the first 5,000 are plain.
        plain, r_steps, d_steps = (k * steps // 130 for k in (5, 35, 20))
        return bnjax.linen.BatchRenorm(
            not train,
            momentum=momentum,
            r_max=optax.linear_schedule(1.0, 3.0, max(r_steps, 1), plain),
            d_max=optax.linear_schedule(0.0, 5.0, max(d_steps, 1), plain),
        )(x, step=step)

    def decorrelated(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.linen.DecorrelatedBatchNorm(
            not train, momentum=momentum, group_size=4, method="newton_schulz"
        )(x)

    def cross_replica(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.BatchNorm(not train, momentum=momentum, axis_name=AXIS)(x)

    def group_norm(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return nn.GroupNorm(num_groups=4)(x)

    def layer_norm(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        # Over height, width and channels, with a scale per channel: Wu & He 2018.
        return nn.GroupNorm(num_groups=1)(x)

    return {
        "batch_norm": batch_norm,
        "ghost": ghost,
        "frozen": batch_norm,
        "renorm": renorm,
        "decorrelated": decorrelated,
        "cross_replica": cross_replica,
        "group_norm": group_norm,
        "layer_norm": layer_norm,
    }[name]


def without_bias(width: int, size: tuple[int, ...], *, strides: int) -> nn.Module:
    """A convolution that a normalization with a bias of its own follows."""
    return nn.Conv(width, size, strides=strides, use_bias=False)


class ConvNet(nn.Module):
    """Convolutions of 3x3, each normalized and rectified, then the mean and a matrix.

    Attributes:
        widths: the channels of each convolution.
        strides: of each convolution.
        norm: see `make_norm`.
        center: what is subtracted from pixels.
        spread: what they are then divided by.
        conv: (channels, size, strides=...) to the layer.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    norm: Norm
    center: float = 0.0
    spread: float = 1.0
    conv: Conv = without_bias

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool, step: ArrayLike = 0) -> jax.Array:
        """The logits of 10 classes.

        Args:
            x: (batch, height, width, colour), uint8.
            train: whether to normalize by the batch, and update the running statistics.
            step: of the training.
        """
        y = (jnp.asarray(x, np.float32) - self.center) / self.spread
        for width, stride in zip(self.widths, self.strides, strict=True):
            y = self.conv(width, (3, 3), strides=stride)(y)
            y = nn.relu(self.norm(y, train, step))
        return nn.Dense(10)(y.mean((1, 2)))
