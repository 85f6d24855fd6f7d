"""Running statistics as a whole: merged, and reset."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import _checks, _dtypes, _trees
from bnjax.moments import Moments, merged_rows
from bnjax.running import State, ema


def merge_batch_stats(
    batch_stats: Any,
    *,
    counts: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Any:
    """Merges running statistics that replicas have kept each for itself.

        mean = sum_r w_r mean_r,   var = sum_r w_r (var_r + |mean_r - mean|^2),
        w_r = count_r / sum count

    That is E[var] + Var[mean], the variance of all the replicas' values. The mean of
    the variances, which `lax.pmean(batch_stats)` gives, leaves Var[mean] out.

    Args:
        batch_stats: a tree of {mean, var}; what else it holds (the vectors of
            `nn.SpectralNorm`) stays as it is. Without `axis_name` the values of
            replicas lie along a leading axis, as in what `jax.pmap` or
            `multihost_utils.process_allgather` returns; stack others first.
        counts: how many values each replica has seen, (replica,); with `axis_name` the
            own one, a scalar. None: as many as the others. Replicas with count 0 change
            nothing, whatever they hold; if all have, the result is mean 0, var 1.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to merge over.

    Returns:
        `batch_stats` of the same structure and dtypes, each mean and var without the
        leading axis.

    Raises:
        ValueError: a layer that has one of mean and var (and a covariance), no leading
            axis, counts of another length, an axis name that is repeated or not bound.

    >>> apart = {"mean": jnp.array([[2.0], [7.0]]), "var": jnp.array([[1.0], [4.0]])}
    >>> merged = merge_batch_stats({"norm": apart})          # of {1, 3} and {5, 9}
    >>> print(merged["norm"]["var"])
    [8.75]

    References: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    axis_name = _checks.axis_name(axis_name)
    if counts is not None:  # NumPy's are of int64: as int32 they would begin again
        counts = jnp.asarray(counts, float)

    leaves, structure = _trees.flatten(batch_stats)
    for layer, has in _layers(leaves).items():
        paths = [f"{layer}/{name}".removeprefix("/") for name in State._fields]
        if has == {*State._fields}:
            stats = State(*(leaves[path] for path in paths))
            leaves |= zip(paths, _merge(stats, counts, axis_name, layer))
        elif has:
            raise ValueError(_checks.NO_STATISTICS.format(path=layer))
    return jax.tree.unflatten(structure, leaves.values())


def reset_batch_stats(batch_stats: Any) -> Any:
    """Running statistics as `init` leaves them: mean 0, var 1.

    Before fine-tuning on other data, or to begin an average anew.

    Args:
        batch_stats: a tree of {mean, var}, of Linen or of NNX. What else it holds (the
            vectors of `nn.SpectralNorm`) stays as it is.

    Returns:
        `batch_stats` of the same structure, shapes and dtypes.

    Raises:
        ValueError: a layer that has a covariance in place of var.

    >>> stats = {"norm": {"mean": jnp.array([5.0]), "var": jnp.array([7.0])}}
    >>> print(reset_batch_stats(stats))
    {'norm': {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}}

    References: Li et al. 2016 (AdaBN), section 3 (statistics of another domain).
    """
    start = ema().init
    layers = _layers(_trees.flatten(batch_stats)[0])

    def reset(path: str, value: Any) -> Any:
        layer, _, name = path.rpartition("/")
        if name in State._fields:
            return start(jnp.shape(value), jnp.asarray(value).dtype)._asdict()[name]
        if len(layers[layer]) == 1:  # the mean, and a covariance
            raise ValueError(_checks.NO_STATISTICS.format(path=layer or name))
        return value

    return _trees.map_paths(reset, batch_stats)


def _layers(leaves: Mapping[str, Any]) -> dict[str, set[str]]:
    """Which of mean and var each layer has, by its path."""
    layers: dict[str, set[str]] = {}
    for path in leaves:
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, set()).update({name} & {*State._fields})
    return layers


def _merge(stats: State, counts, axis_name, path: str) -> tuple[jax.Array, ...]:
    """The merged mean and var of one layer."""
    given = [jnp.asarray(value) for value in stats]
    mean, var = (v.astype(_dtypes.statistics(v.dtype)) for v in given)
    if axis_name is None:
        _checks.replicas(path, mean.shape, None if counts is None else counts.shape)
    lead = mean.shape[:1] if axis_name is None else ()
    count = jnp.ones(lead, var.dtype) if counts is None else counts.astype(var.dtype)
    seen = count.reshape(*lead, *(1 for _ in mean.shape[len(lead) :])) > 0
    mean, var = jnp.where(seen, mean, 0), jnp.where(seen, var, 0)
    m2 = var * count.reshape(seen.shape)
    local = Moments(count, mean, m2)
    if axis_name is not None:  # the axis of replicas is the named one
        local = jax.tree.map(lambda value: value[None], local)
    merged = merged_rows(local, axis_name)
    new = merged.mean, jnp.where(merged.count > 0, merged.variance(), 1)
    return tuple(v.astype(old.dtype) for v, old in zip(new, given))
