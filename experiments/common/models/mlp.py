"""Models of the experiments."""

import flax.linen as nn
import jax

import bnjax


class SigmoidMLP(nn.Module):
    """The network of Ioffe & Szegedy 2015, section 4.1: sigmoid layers, then softmax.

    With `normalize`, batch normalization stands between the matrix of each hidden layer
    and its sigmoid, and brings its own bias. The kernels have the same names either
    way, so that one key gives both networks the same weights.

    Attributes:
        normalize: whether the hidden layers are batch-normalized.
        std: of the Gaussian that the weights are drawn from.
        momentum: of the running statistics.
        hidden: the sizes of the hidden layers.
        classes: the number of logits.
    """

    normalize: bool
    std: float = 0.1
    momentum: float = 0.9
    hidden: tuple[int, ...] = (100, 100, 100)
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """The logits and the input of the last hidden layer's sigmoids.

        Args:
            x: (batch, pixels).
            train: whether to normalize by the batch, and update the running statistics.
        """
        gaussian = nn.initializers.normal(self.std)
        z = x
        for size in self.hidden:
            z = nn.Dense(size, use_bias=not self.normalize, kernel_init=gaussian)(x)
            if self.normalize:
                z = bnjax.BatchNorm(not train, momentum=self.momentum)(z)
            x = nn.sigmoid(z)
        return nn.Dense(self.classes, kernel_init=gaussian)(x), z
