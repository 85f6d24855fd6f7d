"""The Jacobians of hidden layers, and what the scale of the weights is to them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bnjax
from experiments.common.models.deep import ACTIVATIONS, Net, hidden

PERCENTILES = 5, 25, 50, 75, 95
QUANTITIES = "output", "input's Jacobian", "gradient"
"""That `deviations` compares."""


def with_statistics(params: dict[str, Any], statistics: Any) -> dict[str, Any]:
    """The hidden layers' parameters, and the statistics that `Net.apply` returned."""
    return {name: params[name] | statistics[name] for name in ("first", "rest")}


@functools.partial(jax.jit, static_argnums=0)
def of_layers(net: Net, params: Any, statistics: Any, x: jax.Array) -> jax.Array:
    """The Jacobian of each hidden layer but the first, (layer, example, unit, unit).

    With BN of the transformation between normalized vectors, before scale and bias,
    from one layer to the next (Ioffe & Szegedy 2015, section 3.3); without, between
    what two activations are given. The statistics are constants.

    Args:
        net: the network.
        params: of it.
        statistics: as `net.apply` returned them.
        x: (example, pixel).
    """
    first, *others = hidden(with_statistics(params, statistics))

    def normalized(x, own):
        if not net.normalize:
            return net.preactivation(x, own)[0]
        return bnjax.normalize(x @ own["kernel"], own["mean"], own["var"])

    def activated(z, own):
        y = z * own["scale"][None] + own["bias"][None] if net.normalize else z
        return ACTIVATIONS[net.activation](y)

    z, below, found = normalized(x, first), first, []
    for own in others:

        def between(one, below=below, own=own):  # of one example
            return normalized(activated(one[None], below), own)[0]

        found.append(jax.vmap(jax.jacfwd(between))(z))
        z, below = normalized(activated(z, below), own), own
    return jnp.stack(found)


def singular_values(jacobians: jax.Array) -> np.ndarray:
    """Percentiles over units and examples, (layer, percentile)."""
    finite = np.isfinite(np.asarray(jacobians)).all()
    if not finite:  # of a network that diverged
        return np.full((len(jacobians), len(PERCENTILES)), np.nan)
    values = np.linalg.svd(np.asarray(jacobians), compute_uv=False)
    return np.percentile(values.reshape(len(values), -1), PERCENTILES, axis=1).T


def deviations(
    net: Net, params: Any, x: jax.Array, factors: Sequence[float]
) -> np.ndarray:
    """How far a W of a hidden layer is from W: (quantity, factor), the worst layer.

    Each is |of a W - of W| / |of W|: of the layer's normalized output; of its input's
    cotangent, for a random one of the output; and of that of W, times a. They are those
    of training: the batch's statistics are differentiated through.

    Args:
        net: the network.
        params: of it.
        x: (example, pixel).
        factors: a, positive.
    """
    random = np.random.default_rng(0)
    cotangent = jnp.asarray(random.normal(size=(len(x), net.width)), x.dtype)
    rows, u = [], x
    for own in hidden(params):
        rows.append(_deviations(net, own, u, cotangent, jnp.asarray(factors)))
        u, _ = net.layer(u, own)
    return np.max(rows, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _deviations(net: Net, own, u, cotangent, factors: jax.Array) -> jax.Array:
    """Of one layer, whose input is `u`: (quantity, factor)."""

    def scaled(a):
        def preactivation(u, kernel):
            return net.preactivation(u, own | {"kernel": kernel})[0]

        z, pullback = jax.vjp(preactivation, u, a * own["kernel"])
        of_u, of_kernel = pullback(cotangent)
        return z, of_u, a * of_kernel

    def compare(a):
        pairs = zip(scaled(a), scaled(1.0), strict=True)
        return jnp.stack(
            [jnp.linalg.norm(s - t) / jnp.linalg.norm(t) for s, t in pairs]
        )

    return jax.lax.map(compare, factors).T
