"""Measures of activations, and whether replicas hold the same values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes, _trees


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
        differences: of each array that differs, by its path; the farthest first.
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

    A replicated array has one copy on every device, and JAX believes that they are
    equal. They are not where statistics were left unsynchronised in pmap or in
    shard_map(check_vma=False), or where processes have gone apart; each device then
    evaluates another model.

    Args:
        statistics: a tree of arrays: `batch_stats`, or parameters.
        axis: None compares the copies that devices hold of each array, those of all
            processes (which must all call this). An integer names the axis along which
            the values of replicas lie, as in what `jax.pmap` returns.
        rtol: differences up to this, relative to the largest magnitude, are not one.

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
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    if axis is None:
        copies = _on_devices([leaf for _, leaf in leaves])
    else:
        copies = [[_along(axis, *item)] for item in zip(paths, (v for _, v in leaves))]
    found = {}
    for path, sets in zip(paths, copies):
        difference = max(map(_difference, sets))
        if difference.relative > rtol:
            found[path] = difference
    farthest = sorted(found.items(), key=lambda item: -item[1].relative)
    replicas = max((len(s) for sets in copies for s in sets), default=0)
    return Agreement(replicas, dict(farthest))


def _along(axis: int, path: str, value) -> np.ndarray:
    """`value` with the axis of its replicas leading."""
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
    return [[np.stack(s) for s in sets] for sets in copies]


def _is_whole(leaf) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_replicated


def _difference(copies: np.ndarray) -> Difference:
    """Between copies, (copies, ...), NaN being equal to NaN."""
    if not copies.size or (copies.tobytes() == copies[:1].tobytes() * len(copies)):
        return Difference(0.0, 0.0)
    wide = copies.astype(np.complex128 if np.iscomplexobj(copies) else np.float64)
    same = (wide == wide[:1]) | (np.isnan(wide) & np.isnan(wide[:1]))
    unequal = ~same.all(0)
    if not unequal.any():
        return Difference(0.0, 0.0)
    here = wide[:, unequal]
    if not np.isfinite(here).all():
        return Difference(np.inf, np.inf)
    parts = [here.real, here.imag] if np.iscomplexobj(here) else [here]
    absolute = float(np.hypot.reduce([np.ptp(part, 0) for part in parts]).max())
    largest = float(np.abs(wide[np.isfinite(wide)]).max())
    return Difference(absolute, absolute / largest)
