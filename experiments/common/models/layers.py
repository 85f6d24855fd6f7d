"""Normalizations by name, each with the convolutions that it goes with."""

from functools import partial
from typing import Literal

import flax.linen as nn
import jax
from jax.typing import ArrayLike

import bnjax
from experiments.common.models.norms import Conv, ConvNet, Norm

Normalizer = Literal[
    "batch", "whitening", "iternorm", "group", "layer", "weight", "none"
]
Name = Normalizer | Literal["noise", "noisy batch"]
GROUPS = 4  # of group normalization
MOMENTUM = 0.9  # of running statistics
BOUNDS = (-0.5, 0.5), (1.0, 1.25)  # of a layer's shift and scale
RADIUS = 0.1  # of the noise around them
BIASED = partial(nn.Conv, kernel_init=nn.initializers.he_normal())
UNBIASED = partial(BIASED, use_bias=False)


class Noise(nn.Module):
    """The noise of Santurkar et al. 2018: no distribution stays as it was for a step.

        y = s x + m,   m ~ U(shift - 0.1, shift + 0.1),   s ~ N(scale, 0.1)

    m and s are drawn for each value; shift ~ U(-0.5, 0.5) and scale ~ U(1, 1.25) for
    the layer, anew at each step. At test the means stand for them: y = 1.125 x.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train:
            return x * (sum(BOUNDS[1]) / 2)
        keys = jax.random.split(self.make_rng("dropout"), 4)
        shift = jax.random.uniform(keys[0], (), x.dtype, *BOUNDS[0])
        scale = jax.random.uniform(keys[1], (), x.dtype, *BOUNDS[1])
        m = shift + RADIUS * jax.random.uniform(keys[2], x.shape, x.dtype, -1, 1)
        s = scale + RADIUS * jax.random.normal(keys[3], x.shape, x.dtype)
        return s * x + m


def make_network(
    name: Name,
    widths: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    center: float,
    spread: float,
    whitened: int | None = None,
) -> ConvNet:
    """A network of 3x3 convolutions, with He's initial weights.

    Args:
        name: of the normalization.
        widths: the channels of each convolution.
        strides: of each convolution.
        center: what is subtracted from pixels.
        spread: what they are then divided by.
        whitened: channels that are whitened together; None for all of a layer.
    """
    conv, norm = _layer(name, whitened)
    return ConvNet(widths, strides, norm, center, spread, conv)


def _layer(name: Name, whitened: int | None) -> tuple[Conv, Norm]:
    """The convolution and what follows it; with a bias where nothing else adds one."""

    def nothing(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return x

    def batch(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.BatchNorm(not train, momentum=MOMENTUM)(x)

    def layer(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        # Over height, width and channels, with a scale per channel: Wu & He 2018.
        return nn.LayerNorm(reduction_axes=(1, 2, 3))(x)

    def group(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return nn.GroupNorm(num_groups=GROUPS)(x)

    def whiten(method: str, x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return bnjax.linen.DecorrelatedBatchNorm(
            not train, momentum=MOMENTUM, group_size=whitened, method=method
        )(x)

    def noise(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return Noise()(x, train)

    def noisy_batch(x: jax.Array, train: bool, step: ArrayLike) -> jax.Array:
        return noise(batch(x, train, step), train, step)

    return {
        "none": (BIASED, nothing),
        "batch": (UNBIASED, batch),
        "layer": (UNBIASED, layer),
        "group": (UNBIASED, group),
        "weight": (_weight_normalized, nothing),
        "whitening": (UNBIASED, partial(whiten, "eigh")),
        "iternorm": (UNBIASED, partial(whiten, "newton_schulz")),
        "noise": (BIASED, noise),
        "noisy batch": (UNBIASED, noisy_batch),
    }[name]


def _weight_normalized(width: int, size: tuple[int, ...], *, strides: int) -> nn.Module:
    """Kernels of length sqrt(2), which He's have on average; with a bias."""
    scale = nn.initializers.constant(2**0.5)
    return nn.WeightNorm(BIASED(width, size, strides=strides), scale_init=scale)
