"""Measures of layers and of activations, and whether replicas hold the same values."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes, _trees
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
        epsilon: the epsilon of the layers: a variance below it makes no difference.

    Returns:
        Drift by layer path, for the layers in `batch_moments` except those that whiten.
        (0, 1) for a feature without a value in the batch.

    Raises:
        ValueError: no moments; moments of a layer that `batch_stats` does not have, or
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
        epsilon: the epsilon of the layers.
        largest: the largest magnitude that does not count as exploded; the largest
            number of float16 is 6.5e4.
        smallest_gamma: the smallest |scale| that does not count as zero.

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
        fits = (size <= largest) & (var <= largest**2)  # False for NaN
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
    """The collection `batch_stats`; raises if there is none."""
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables has the collections {list(variables)}: expected 'batch_stats', "
            "and 'params' for the scales. Write {'params': params, 'batch_stats': "
            "batch_stats}."
        )
    return variables["batch_stats"]


def statistics_of(batch_stats: Any) -> dict[str, dict[str, jax.Array]]:
    """The nodes with a mean and a var, by path."""
    return _nodes(batch_stats, {"mean", "var"})


def moments_of(batch_moments: Any) -> dict[str, Moments]:
    """The Moments that layers have left, by path, without CoMoments."""
    nodes = _nodes(batch_moments, {"moments"})
    recorded = {path: node["moments"] for path, node in nodes.items()}
    return {path: m for path, m in recorded.items() if isinstance(m, Moments)}


def counts_of(batch: Moments) -> np.ndarray:
    """The number of values of each feature."""
    m2 = jnp.asarray(batch.m2)
    return np.asarray(broadcast_count(jnp.asarray(batch.count), m2))


def _nodes(tree: Any, keys: set[str]) -> dict[str, dict[str, Any]]:
    """The variables of the layers that have these names, by path of the layer."""
    layers: dict[str, dict[str, Any]] = {}
    for path, leaf in _trees.flatten(_trees.unboxed(tree))[0].items():
        name = path.rpartition("/")[2]
        layers.setdefault(_trees.layer_of(path), {})[name] = leaf
    return {path: names for path, names in layers.items() if keys <= set(names)}


def _shapes(running: Mapping[str, Any]) -> str:
    shapes = (f"{p} {jnp.shape(stats['mean'])}" for p, stats in running.items())
    return ", ".join(shapes) or "none"


def percentiles(
    x: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1
) -> jax.Array:
    """Percentiles of each feature's activations.

    Followed over training, those at 15, 50 and 85 show how a layer's input drifts.

    Args:
        x: (batch, *spatial, feature), floating.
        q: percentages in [0, 100], a scalar or (percentile,).
        axis: the feature axis or axes.

    Returns:
        (percentile, feature), or (feature,) for a scalar q.

    Raises:
        TypeError: x is not floating.

    >>> x = jnp.array([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0]])
    >>> print(percentiles(x, jnp.array([50.0, 100.0])))
    [[ 1. 20.]
     [ 2. 30.]]

    References: Ioffe & Szegedy 2015, section 4.1, figure 1(b, c).
    """
    x = _checks.require_inexact("x", x)
    axes = _axes.canonical(axis, x.ndim)
    return jnp.percentile(x, jnp.asarray(q), axis=_axes.complement(axes, x.ndim))


def effective_rank(x: ArrayLike, *, axis: int | Sequence[int] = -1) -> jax.Array:
    """How many independent directions the features span.

        exp(-sum_i p_i log p_i),  p_i = lambda_i / sum lambda, of the covariance

    The number of features where they are uncorrelated and of one variance, 1 where all
    are multiples of one, 0 where nothing varies.

    Args:
        x: (batch, *spatial, feature), floating.
        axis: the feature axis or axes; several count as one.

    Returns:
        A scalar, at most the number of features.

    Raises:
        TypeError: x is not floating.

    >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> print(effective_rank(x).round(3), effective_rank(x * jnp.array([[1.0, 0.0]])))
    2.0 1.0

    References: Roy & Vetterli 2007, of the covariance matrix.
    """
    x = _checks.require_inexact("x", x)
    x = x.astype(_dtypes.statistics_dtype(x.dtype))
    axes = _axes.canonical(axis, x.ndim)
    rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
    rows = rows.reshape(-1, math.prod(_axes.sizes(x.shape, axes)))
    rows = rows - rows.mean(0, keepdims=True)
    values = jnp.maximum(jnp.linalg.eigvalsh(rows.conj().T @ rows), 0)
    total = values.sum()
    p = values / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(p).sum()), 0)


class Difference(NamedTuple):
    """How far the copies of one array lie apart.

    Attributes:
        absolute: the largest difference between two copies of one element; infinite
            where one copy is not finite and another differs from it.
        relative: the same over the largest magnitude in any copy.
    """

    absolute: float
    relative: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Whether replicas hold the same values; true where they do.

    Attributes:
        replicas: the most copies that were compared of any array.
        differences: by path, the arrays that differ; the largest difference first.
    """

    replicas: int
    differences: dict[str, Difference]

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self:
            return f"{self.replicas} replicas agree"
        lines = [
            f"  {path}: {d.absolute:.3g} ({d.relative:.1e} of the largest value)"
            for path, d in self.differences.items()
        ]
        return "\n".join([f"{self.replicas} replicas differ:", *lines])


def replicas_agree(
    statistics: Any, *, axis: int | None = None, rtol: float = 0.0
) -> Agreement:
    """Which layers' statistics differ between replicas, and by how much.

        difference = max_r value_r - min_r value_r,  per element

    A replicated array has one copy on every device, and JAX assumes that the copies
    are equal. They differ where statistics were not synchronised in pmap or in
    shard_map(check_vma=False), or where processes have diverged. Each device then
    evaluates another model.

    Args:
        statistics: a tree of arrays: `batch_stats`, or parameters.
        axis: None compares the copies of each array on all devices of all processes,
            which must all call this function. An integer names the axis along which
            the values of replicas lie, as in the results of `jax.pmap`.
        rtol: the largest difference that is ignored, relative to the largest magnitude.

    Returns:
        Agreement, true where all agree; `differences` by path, the farthest first;
        `print` shows them.

    Raises:
        ValueError: an array has no such axis.

    >>> stats = {"norm": {"mean": np.array([[0.0, 4.0], [0.0, 5.0]]), "var": np.eye(1)}}
    >>> print(replicas_agree(stats, axis=0))
    2 replicas differ:
      norm/mean: 1 (2.0e-01 of the largest value)

    References: google/flax#921 on statistics that were never synchronised.
    """
    leaves = jax.tree.flatten_with_path(_trees.unboxed(statistics))[0]
    paths = [_trees.name_of(path) for path, _ in leaves]
    if axis is None:
        copies = _on_devices([leaf for _, leaf in leaves])
    else:
        copies = [
            [_replicas_first(axis, *item)]
            for item in zip(paths, (v for _, v in leaves))
        ]
    differences = {}
    for path, shards in zip(paths, copies):
        difference = max(map(_difference, shards))
        if difference.relative > rtol:
            differences[path] = difference
    farthest = sorted(differences.items(), key=lambda item: -item[1].relative)
    replicas = max((len(shard) for shards in copies for shard in shards), default=0)
    return Agreement(replicas, dict(farthest))


def _replicas_first(axis: int, path: str, value) -> np.ndarray:
    """`value` with the axis of replicas moved to the front."""
    value = np.asarray(value)
    _checks.replica_axis(path, value.shape, axis)
    return np.moveaxis(value, axis, 0)


def _on_devices(leaves: list) -> list[list[np.ndarray]]:
    """For each array, the copies of each of its shards: (copies, ...)."""
    copies = []
    for leaf in leaves:
        shards: dict[Any, list[np.ndarray]] = {}
        for shard in getattr(leaf, "addressable_shards", ()):
            shards.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        copies.append(list(shards.values()) or [[np.asarray(leaf)]])
    if jax.process_count() > 1:  # the shards of a split array differ by process
        whole = [i for i, leaf in enumerate(leaves) if _is_whole(leaf)]
        gathered = multihost_utils.process_allgather([copies[i][0][0] for i in whole])
        for i, others in zip(whole, gathered):
            copies[i][0] += list(others)
    return [[np.stack(shard) for shard in shards] for shards in copies]


def _is_whole(leaf) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_replicated


def _difference(copies: np.ndarray) -> Difference:
    """The difference between copies, (copies, ...); NaN equals NaN."""
    if not copies.size or (copies.tobytes() == copies[:1].tobytes() * len(copies)):
        return Difference(0.0, 0.0)
    wide = copies.astype(np.complex128 if np.iscomplexobj(copies) else np.float64)
    same = (wide == wide[:1]) | (np.isnan(wide) & np.isnan(wide[:1]))
    unequal = ~same.all(0)
    if not unequal.any():
        return Difference(0.0, 0.0)
    differing = wide[:, unequal]
    if not np.isfinite(differing).all():
        return Difference(np.inf, np.inf)
    parts = [differing]
    if np.iscomplexobj(differing):
        parts = [differing.real, differing.imag]
    absolute = float(np.hypot.reduce([np.ptp(part, 0) for part in parts]).max())
    largest = float(np.abs(wide[np.isfinite(wide)]).max())
    return Difference(absolute, absolute / largest)
