"""Plain gradient descent, with the lengths and the turns of the weights on its way."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.common.data.splits import Split
from experiments.common.models.deep import Net, hidden


class Rates(NamedTuple):
    """Of one step.

    Attributes:
        learning: of all parameters but the hidden layers' kernels.
        kernels: of those.
        decay: L2 of those.
    """

    learning: float
    kernels: float
    decay: float


class Steps(NamedTuple):
    """Of each step, with what it began from; a unit's weights w are a column of W.

    Attributes:
        loss: (step,), of the batch.
        length: (step, layer), the root of the mean of |w|^2 over the units.
        slope: (step, layer), the same of the gradient g.
        turn: (step, layer), the same of the angle between w before and after, radians.
        along: (step, layer), the largest |cosine| of w and g, which BN makes 0.
    """

    loss: jax.Array
    length: jax.Array
    slope: jax.Array
    turn: jax.Array
    along: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def descend(
    net: Net, params: Any, rates: Rates, data: Split, batches: np.ndarray
) -> tuple[Any, Steps]:
    """The parameters after a step on each of `batches`.

    Args:
        net: the network.
        params: of it.
        rates: the same for all steps.
        data: images and labels.
        batches: (step, example).
    """

    def loss(params, images, labels):
        logits, _ = net.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def change(path, p, g):
        if path[0].key != "last" and path[1].key == "kernel":
            return p - rates.kernels * (g + rates.decay * p)
        return p - rates.learning * g

    def step(params, batch):
        images = data.images[batch].astype(jnp.float32)
        value, gradient = jax.value_and_grad(loss)(params, images, data.labels[batch])
        new = jax.tree.map_with_path(change, params, gradient)
        layers = zip(hidden(params), hidden(gradient), hidden(new), strict=True)
        rows = [_measure(w["kernel"], g["kernel"], v["kernel"]) for w, g, v in layers]
        return new, Steps(value, *map(jnp.stack, zip(*rows, strict=True)))

    return lax.scan(step, params, batches)


def _measure(w: jax.Array, g: jax.Array, new: jax.Array) -> tuple[jax.Array, ...]:
    """`Steps.length`, `slope`, `turn` and `along` of one layer."""

    def mean(squares):
        return jnp.sqrt(squares.mean())

    def directions(x):
        return x / jnp.maximum(jnp.linalg.norm(x, axis=0, keepdims=True), 1e-30)

    # Of the chord: the cosine of a small angle is 1 in float32.
    chord = jnp.linalg.norm(directions(new) - directions(w), axis=0)
    turn = 2 * jnp.arcsin(jnp.minimum(chord / 2, 1))
    along = jnp.abs((directions(w) * directions(g)).sum(0)).max()
    return mean((w**2).sum(0)), mean((g**2).sum(0)), mean(turn**2), along


def predicted_length(steps: Steps, rate: float) -> jax.Array:
    """(layer,): without L2, the length before the last step if no g is along its w.

    |w|^2 grows by |rate g|^2 in each step (Pythagoras).
    """
    start, taken = steps.length[0], rate * steps.slope[:-1]
    return jnp.sqrt(start**2 + (taken**2).sum(0))


def equilibrium(rate: float, decay: float) -> float:
    """The turn of each step once growth and L2 balance: sqrt(2 rate decay), radians.

    Wan et al. 2021, "Spherical motion dynamics" (here without momentum).
    """
    return math.sqrt(2 * rate * decay)
