"""The residual network of CIFAR-10, in which each layer's addition and ReLU are fused.

References: He et al. 2016 (Deep residual learning), section 4.2; Goyal et al. 2017,
section 5.1 (the last scale of each block starts at 0).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import bnjax


class ResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks of two, a matrix.

    Where a block changes the size, its shortcut is a 1x1 convolution.

    Attributes:
        depth: 6n + 2.
        width: channels of the first stage; 16 in the paper.
        dtype: of the computation; parameters are float32.
        momentum: of the running statistics.
        classes: the number of logits.
    """

    depth: int = 20
    width: int = 16
    dtype: DTypeLike = jnp.float32
    momentum: float = 0.9
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits, float32.

        Args:
            x: (batch, height, width, channels), uint8.
            train: whether to normalize by the batch, and update the running statistics.

        Raises:
            ValueError: no network of the family has this depth.
        """
        blocks, rest = divmod(self.depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(
                f"received depth {self.depth}: expected 6 n + 2, as 8, 14, 20, 32, 44."
            )
        x = (x.astype(self.dtype) - 127.5) / 64
        x = self._norm(train, nn.relu)(self._conv(self.width)(x))
        for stage in range(3):
            for block in range(blocks):
                strides = 2 if stage and not block else 1
                x = self._block(x, self.width * 2**stage, strides, train)
        x = x.mean((1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes)(x)

    def _block(self, x: jax.Array, features: int, strides: int, train: bool):
        y = self._norm(train, nn.relu)(self._conv(features, strides)(x))
        y = self._conv(features)(y)
        if x.shape != y.shape:
            x = self._norm(train)(self._conv(features, strides, kernel=1)(x))
        last = self._norm(train, nn.relu, nn.initializers.zeros)
        return last(y, residual=x)

    def _conv(self, features: int, strides: int = 1, kernel: int = 3) -> nn.Conv:
        return nn.Conv(
            features,
            (kernel, kernel),
            strides,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.he_normal(),
        )

    def _norm(self, train: bool, activation=None, scale_init=nn.initializers.ones):
        return bnjax.BatchNorm(
            not train,
            momentum=self.momentum,
            dtype=self.dtype,
            activation=activation,
            scale_init=scale_init,
        )
