"""The residual network for a data set: CIFAR-10's, or ImageNet's."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import bnjax
from experiments.common.models import imagenet, resnet
from experiments.common.models.imagenet import Basic, Bottleneck, Norm
from experiments.common.settings import SettingsError

STAGES = {
    18: (Basic, (2, 2, 2, 2)),
    34: (Basic, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class Photographic(nn.Module):
    """A residual network of ImageNet, as a training loop calls it.

    Attributes:
        depth: 18, 34 or 50.
        width: channels of the first stage; 64 in the paper.
        dtype: of the computation; parameters are float32.
        momentum: of the running statistics.
        classes: the number of logits.
    """

    depth: int = 18
    width: int = 64
    dtype: DTypeLike = jnp.float32
    momentum: float = 0.9
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits, float32.

        Args:
            x: (batch, height, width, channels), uint8.
            train: whether to normalize by the batch, and update the running statistics.
        """
        layer: Any = functools.partial(bnjax.BatchNorm, momentum=self.momentum)
        norm = Norm(layer, fused=True, train=train)
        block, stages = STAGES[self.depth]
        network = imagenet.ResNet(
            block, stages, norm, self.dtype, width=self.width, classes=self.classes
        )
        return network((x.astype(self.dtype) - 127.5) / 64)


def check(data: str, depth: int) -> None:
    """Raises SettingsError if the data set's networks have no such depth."""
    if (data == "imagenet") != (depth in STAGES):
        expected = "18, 34 or 50" if data == "imagenet" else "6 n + 2, as 8, 14, 20"
        raise SettingsError(
            f"received --depth {depth} for --data {data}: expected {expected}."
        )


def build(
    data: str, depth: int, width: int, dtype: DTypeLike, classes: int
) -> nn.Module:
    """A network that is called as `network(images, train=...)`; it returns logits."""
    made = Photographic if data == "imagenet" else resnet.ResNet
    return made(depth, width, dtype, classes=classes)
