"""Measures of layers, from their variables: dictionaries by the layer's path."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax import _trees
from bnjax.moments import Moments, broadcast_count


class Drift(NamedTuple):
    """How far a batch lies from the running statistics, per feature.

    Attributes:
        mean: (batch mean - running mean) / running standard deviation.
        std: batch standard deviation / running standard deviation; 1 is no drift.
    """

    mean: jax.Array
    std: jax.Array


class Channels(NamedTuple):
    """Which features of a layer are in trouble: booleans, per feature.

    Attributes:
        dead: does not vary.
        exploded: not finite, or so large that half precision overflows.
        gamma_near_zero: scaled by almost nothing.
    """

    dead: jax.Array
    exploded: jax.Array
    gamma_near_zero: jax.Array


def drift(
    batch_stats: Any, batch_moments: Any, *, epsilon: float = 1e-5
) -> dict[str, Drift]:
    """How far each layer's batch lies from its running statistics.

        mean = (mean_B - mean) / sqrt(var + epsilon)
        std  = sqrt((var_B + epsilon) / (var + epsilon))

    Sampling alone moves the mean by about 1/sqrt(count).

    Args:
        batch_stats: a tree of {mean, var}, (feature,) or (domain, feature).
        batch_moments: the tree of Moments that the layers leave.
        epsilon: that of the layers: a variance below it makes no difference.

    Returns:
        Drift by layer path, for the layers in `batch_moments`, but those that whiten.
        (0, 1) for a feature without a value in the batch.

    Raises:
        ValueError: no moments, or those of a layer that `batch_stats` does not have, or
            has with another number of features.

    >>> stats = {"norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> batch = {"norm": {"moments": Moments(8.0, jnp.array([4.0]), jnp.array([32.0]))}}
    >>> drift(stats, batch, epsilon=0.0)["norm"].mean
    Array([1.5], dtype=float32)

    References: Ioffe & Szegedy 2015, section 4.1 (the drift of a layer's input).
    """
    running, batches = statistics_of(batch_stats), moments_of(batch_moments)
    if not batches:
        raise ValueError(
            "batch_moments holds no Moments: expected what the layers leave where the "
            "collection is mutable. Write model.apply(..., mutable=['batch_moments'])."
        )
    result = {}
    for path, batch in batches.items():
        shape = jnp.shape(batch.mean)
        if path not in running or jnp.shape(running[path]["mean"]) != shape:
            raise ValueError(
                f"batch_moments/{path} is of {shape} features: expected a layer of "
                f"batch_stats, which has {_shapes(running)}. Pass both collections of "
                "one model."
            )
        mean, var = running[path]["mean"], running[path]["var"]
        seen = (
            broadcast_count(jnp.asarray(batch.count), jnp.asarray(batch.mean)).real > 0
        )
        shift = (batch.mean - mean) / jnp.sqrt(var + epsilon)
        ratio = jnp.sqrt((batch.variance() + epsilon) / (var + epsilon))
        result[path] = Drift(jnp.where(seen, shift, 0), jnp.where(seen, ratio, 1))
    return result


def channels(
    variables: Mapping[str, Any],
    *,
    epsilon: float = 1e-5,
    largest: float = 1e4,
    smallest_gamma: float = 1e-3,
) -> dict[str, Channels]:
    """Dead channels, exploded ones, and those that the scale switches off.

        dead:             var < epsilon, so that epsilon decides
        exploded:         not finite, or |mean| or sqrt(var) > largest
        gamma near zero:  |scale| < smallest_gamma

    Args:
        variables: {"batch_stats": ..., "params": ...}; the params may be left out.
        epsilon: that of the layers.
        largest: of what does not count as exploded; float16 ends at 6.5e4.
        smallest_gamma: of what does not count as zero.

    Returns:
        Channels by layer path.

    Raises:
        ValueError: no `batch_stats` in `variables`.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.array([1.0, 0.0, jnp.inf])}
    >>> params = {"scale": jnp.array([0.0, 1.0, 1.0])}
    >>> variables = {"batch_stats": {"norm": stats}, "params": {"norm": params}}
    >>> for name, value in channels(variables)["norm"]._asdict().items():
    ...     print(name, value)
    dead [False  True False]
    exploded [False False  True]
    gamma_near_zero [ True False False]

    References: Mehta, Kim & Theobalt 2019 (scales near zero are prunable filters);
    Goyal et al. 2017, section 5.1 (scales that start at zero on purpose).
    """
    scales = _nodes(variables.get("params", {}), {"scale"})
    result = {}
    for path, stats in statistics_of(batch_stats_in(variables)).items():
        size, var = jnp.abs(stats["mean"]), jnp.asarray(stats["var"])
        fits = (size <= largest) & (var <= largest**2)  # not so for NaN
        gamma = scales[path]["scale"] if path in scales else jnp.ones_like(var)
        small = jnp.broadcast_to(jnp.abs(gamma) < smallest_gamma, var.shape)
        result[path] = Channels(var < epsilon, ~fits, small)
    return result


def never_updated(batch_stats: Any) -> dict[str, jax.Array]:
    """Which layers still hold the running statistics that they started with.

        mean = 0 and var = 1, in every feature

    Args:
        batch_stats: a tree of {mean, var}.

    Returns:
        Booleans by layer path: a scalar, or one for each row of statistics that have
        more than one axis, such as the domains of a SplitBatchNorm or the layers of
        `nn.scan`.

    >>> stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    >>> print(never_updated({"norm": stats})["norm"])
    True

    References: pytorch/pytorch#4741, google/flax#1489 (statistics thrown away).
    """
    result = {}
    for path, stats in statistics_of(batch_stats).items():
        mean, var = jnp.asarray(stats["mean"]), jnp.asarray(stats["var"])
        last = tuple(range(mean.ndim)[-1:])
        result[path] = jnp.all((mean == 0) & (var == 1), axis=last)
    return result


def batch_stats_in(variables: Mapping[str, Any]) -> Any:
    """The collection; raises where it is not there."""
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables has the collections {list(variables)}: expected 'batch_stats', "
            "and 'params' for the scales. Write {'params': params, 'batch_stats': "
            "batch_stats}."
        )
    return variables["batch_stats"]


def statistics_of(batch_stats: Any) -> dict[str, Mapping[str, jax.Array]]:
    """The nodes with a mean and a var, by path."""
    return _nodes(batch_stats, {"mean", "var"})


def moments_of(batch_moments: Any) -> dict[str, Moments]:
    """The Moments that layers have left, by path; not what a covariance is made of."""
    nodes = _nodes(batch_moments, {"moments"})
    found = {path: node["moments"] for path, node in nodes.items()}
    return {path: batch for path, batch in found.items() if isinstance(batch, Moments)}


def _nodes(tree: Any, keys: set[str]) -> dict[str, Any]:
    """The dictionaries of a tree that hold these keys, by path."""

    def is_node(node: Any) -> bool:
        return isinstance(node, Mapping) and keys <= set(node)

    leaves = jax.tree.flatten_with_path(_trees.unboxed(tree), is_leaf=is_node)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in leaves
        if is_node(node)
    }


def _shapes(running: Mapping[str, Any]) -> str:
    shapes = (f"{p} {jnp.shape(stats['mean'])}" for p, stats in running.items())
    return ", ".join(shapes) or "none"
