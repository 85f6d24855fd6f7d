"""Deep fully connected networks of equal layers."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

import bnjax

Activation = Literal["sigmoid", "tanh"]
ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Net:
    """A network without its weights.

    Attributes:
        depth: the number of hidden layers.
        width: the size of each.
        activation: after each.
        normalize: whether each hidden layer is batch-normalized before the activation.
    """

    depth: int
    width: int
    activation: Activation
    normalize: bool

    def init(self, key: jax.Array, pixels: int, std: jax.Array) -> dict[str, Any]:
        """Weights; the same draws for every `std`, with and without normalization.

        Args:
            key: of the Gaussian.
            pixels: the number of inputs.
            std: of the hidden layers' weights, times sqrt(inputs of the layer).
        """
        first, rest, last = jax.random.split(key, 3)
        more, width = (self.depth - 1,), (self.width,)
        params = {
            "first": {"kernel": std * _gaussian(first, pixels, self.width)},
            "rest": {"kernel": std * _gaussian(rest, self.width, self.width, *more)},
            "last": {
                "kernel": _gaussian(last, self.width, CLASSES),
                "bias": jnp.zeros(CLASSES),
            },
        }
        for part, shape in (("first", width), ("rest", more + width)):
            params[part]["bias"] = jnp.zeros(shape)
            if self.normalize:
                params[part]["scale"] = jnp.ones(shape)
        return params

    def preactivation(
        self, x: jax.Array, own: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What one hidden layer's activation is given, and the statistics used.

        Args:
            x: (example, input).
            own: the layer's parameters; with "mean" and "var" it normalizes by these,
                otherwise by those of its batch.
        """
        z, used = x @ own["kernel"], {}
        if not self.normalize:
            z = z + own["bias"][None]
        elif "mean" in own:
            used = {"mean": own["mean"], "var": own["var"]}
            z = bnjax.normalize(z, own["mean"], own["var"], own["scale"], own["bias"])
        else:
            z, moments = bnjax.batch_norm(z, own["scale"], own["bias"])
            used = {"mean": moments.mean, "var": moments.variance()}
        return z, used

    def layer(
        self, x: jax.Array, own: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One hidden layer with its activation; see `preactivation`."""
        z, used = self.preactivation(x, own)
        return ACTIVATIONS[self.activation](z), used

    def apply(
        self, params: dict[str, Any], x: jax.Array, statistics: Any = None
    ) -> tuple[jax.Array, Any]:
        """Logits, and what the hidden layers were normalized by.

        Args:
            params: from `init`.
            x: (example, pixel).
            statistics: to normalize by, as they are returned; None for those of `x`.
        """
        known = statistics or {"first": {}, "rest": {}}
        x, first = self.layer(x, params["first"] | known["first"])
        # A loop, or 50 layers take a minute to compile.
        x, rest = lax.scan(self.layer, x, params["rest"] | known["rest"])
        logits = x @ params["last"]["kernel"] + params["last"]["bias"][None]
        return logits, {"first": first, "rest": rest}


def hidden(params: dict[str, Any]) -> list[dict[str, jax.Array]]:
    """What each hidden layer has of its own, one after the other."""
    rest = params["rest"]
    layers = range(len(rest["kernel"]))
    return [params["first"], *({n: v[i] for n, v in rest.items()} for i in layers)]


def _gaussian(key: jax.Array, inputs: int, outputs: int, *more: int) -> jax.Array:
    """Matrices (*more, inputs, outputs) of variance 1/inputs."""
    return jax.random.normal(key, (*more, inputs, outputs)) / math.sqrt(inputs)
