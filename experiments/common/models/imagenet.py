"""The residual networks of ImageNet, with any layer for batch normalization.

They differ from each other in nothing but speed and memory: whichever layer, with its
own activation and residual sum or without, recomputed or not, the parameters have the
same names and the result is the same.

References: He et al. 2016 (Deep residual learning), table 1; the stride of a bottleneck
is in its 3x3 convolution.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Norm(NamedTuple):
    """How a network normalizes.

    Attributes:
        layer: `flax.linen.BatchNorm` or one that replaces it.
        fused: whether the layer is told the activation and the residual.
        remat: `nn.remat` with its options, or None: what is computed again backward.
        region: whether a block or a stage at a time.
        train: whether by the batch, and the running statistics are updated.
    """

    layer: type[nn.Module]
    fused: bool = False
    remat: Callable[[Any], Any] | None = None
    region: Literal["block", "stage"] = "block"
    train: bool = True

    def __call__(self, x: jax.Array, activation=None, residual=None) -> jax.Array:
        """activation(normalized x + residual), in the dtype of `x`."""
        running = not self.train
        options: dict[str, Any] = {"use_running_average": running, "dtype": x.dtype}
        if self.fused:
            layer: Any = self.layer(**options, activation=activation)
            return layer(x, residual=residual)
        y = self.layer(**options)(x)
        y = y if residual is None else y + residual
        return y if activation is None else activation(y)


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    features: int
    strides: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(_conv(x, self.features, 3, self.strides), nn.relu)
        y = _conv(y, self.features, 3)
        return self.norm(y, nn.relu, _shortcut(x, y, self.strides, self.norm))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, the last to four times the features."""

    features: int
    strides: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(_conv(x, self.features, 1), nn.relu)
        y = self.norm(_conv(y, self.features, 3, self.strides), nn.relu)
        y = _conv(y, 4 * self.features, 1)
        return self.norm(y, nn.relu, _shortcut(x, y, self.strides, self.norm))


class ResNet(nn.Module):
    """A stem, stages of blocks of doubling width, the mean over space, a matrix.

    Attributes:
        block: `Basic` or `Bottleneck`.
        stages: blocks in each.
        norm: how it normalizes.
        dtype: of the computation; parameters are float32.
        small: whether images are small, as CIFAR's: the stem is a 3x3 convolution.
        width: features of the first stage.
        classes: the number of logits.
    """

    block: type[nn.Module]
    stages: tuple[int, ...]
    norm: Norm
    dtype: DTypeLike = jnp.float32
    small: bool = False
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits, float32, of images (batch, height, width, channels)."""
        x = x.astype(self.dtype)
        kernel, strides = (3, 1) if self.small else (7, 2)
        x = self.norm(_conv(x, self.width, kernel, strides), nn.relu)
        if not self.small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage in range(len(self.stages)):
            x = self._region("stage", _stage, stage)(self, x)
        x = x.mean((1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes)(x)

    @nn.nowrap
    def _region(self, kind: str, part: Callable[..., jax.Array], *which: int):
        """A part of the network, computed again backward if it is to be."""

        def run(network: ResNet, x: jax.Array) -> jax.Array:
            return part(network, x, *which)

        again = self.norm.remat if self.norm.region == kind else None
        return run if again is None else again(run)


def _stage(network: ResNet, x: jax.Array, stage: int) -> jax.Array:
    for index in range(network.stages[stage]):
        x = network._region("block", _block, stage, index)(network, x)
    return x


def _block(network: ResNet, x: jax.Array, stage: int, index: int) -> jax.Array:
    features, strides = network.width * 2**stage, 2 if stage and not index else 1
    block: Any = network.block
    return block(features, strides, network.norm, name=f"stage{stage}_block{index}")(x)


def _conv(x: jax.Array, features: int, kernel: int, strides: int = 1) -> jax.Array:
    layer = nn.Conv(
        features,
        (kernel, kernel),
        strides,
        use_bias=False,
        dtype=x.dtype,
        kernel_init=nn.initializers.he_normal(),
    )
    return layer(x)


def _shortcut(x: jax.Array, y: jax.Array, strides: int, norm: Norm) -> jax.Array:
    """`x`; projected and normalized, if the block changes its shape to that of `y`."""
    if x.shape == y.shape:
        return x
    return norm(_conv(x, y.shape[-1], 1, strides))
