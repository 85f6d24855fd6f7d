"""A small convolutional network with dropout and local response normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import bnjax
from experiments.common.models.lrn import local_response_norm

MOMENTUM = 0.9  # of the running statistics
RESPONDING = 2  # convolutions that are followed by LRN, as in AlexNet and GoogLeNet


class RegularizedNet(nn.Module):
    """Convolutions of 3x3, each rectified; the mean over positions, and a matrix.

    Attributes:
        widths: the channels of each convolution.
        strides: of each convolution.
        normalize: whether each convolution is batch-normalized; else it has a bias.
        dropout: the share of the means that is dropped.
        lrn: alpha of local response normalization after the first RESPONDING
            convolutions; 0 for none.
        center: what is subtracted from pixels.
        spread: what they are then divided by.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    normalize: bool
    dropout: float = 0.0
    lrn: float = 0.0
    center: float = 0.0
    spread: float = 1.0

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool) -> jax.Array:
        """The logits of 10 classes.

        Args:
            x: (batch, height, width, colour), as they lie in the data.
            train: whether to drop out, and to normalize by the batch.
        """
        y = (jnp.asarray(x, np.float32) - self.center) / self.spread
        init = nn.initializers.he_normal()
        shapes = zip(self.widths, self.strides, strict=True)
        for layer, (width, stride) in enumerate(shapes):
            bias = not self.normalize
            y = nn.Conv(width, (3, 3), stride, use_bias=bias, kernel_init=init)(y)
            if self.normalize:
                y = bnjax.BatchNorm(not train, momentum=MOMENTUM)(y)
            y = nn.relu(y)
            if self.lrn and layer < RESPONDING:
                y = local_response_norm(y, alpha=self.lrn)
        y = nn.Dropout(self.dropout, deterministic=not train)(y.mean((1, 2)))
        return nn.Dense(10)(y)
