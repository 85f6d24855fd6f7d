"""Population statistics: running statistics estimated anew from data.

    algorithm_2   mean = E_B[mean_B],  var = E_B[m/(m-1) var_B]            (the paper's)
    pooled        mean = E[mean_B],    var = E[mean_B^2 + var_B] - E[mean_B]^2

The weights are frozen meanwhile. `pooled` is the variance of all values, however they
are split into batches. `algorithm_2` leaves out the variance of the batches' means.
Where the examples of a batch are independent, m/(m-1) makes up for that. Where they are
not, the result is too small: the smaller the batches, the more.

The model is called as `apply_fn(variables, batch)`. It normalizes with the statistics
of the batch, and returns the Moments that its layers store in `batch_moments`. For
Linen:

    def apply_fn(variables, batch):
        return model.apply(
            variables, batch, train=True, mutable=["batch_stats", "batch_moments"]
        )

and for NNX:

    recording = nnx.view(model, record_moments=True)
    graphdef, stats, others = nnx.split(recording, nnx.BatchStat, ...)

    def apply_fn(variables, batch):
        model = nnx.merge(graphdef, variables["batch_stats"], variables["others"])
        model(batch)
        return nnx.state(model, bnjax.nnx.BatchMoments)

    new = pooled(apply_fn, {"batch_stats": stats, "others": others}, batches)
    nnx.update(model, new)

`batch` is whatever `apply_fn` takes: images with a mask of their padding, arrays split
over devices, shards for a shard_map in the model. The inputs of a layer that is called
twice count as one batch. Averages are kept in float64 on the host.

The variants: The batch of a GhostBatchNorm is all of `batch`, whatever its groups of
examples. Each domain of a SplitBatchNorm is estimated from its own examples, and has to
occur. The output of a BatchRenorm depends on the statistics that it had: give
`apply_fn` a model with r_max=1, d_max=0, which normalizes with the statistics of the
batch. The covariances of a DecorrelatedBatchNorm are not estimated: name it in `keep`.
Other leaves of `batch_stats`, such as the vectors of `nn.SpectralNorm`, stay as they
are.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from bnjax import _trees
from bnjax.moments import Moments

__all__ = ["algorithm_2", "pooled"]

_NO_BATCH = (
    "batches is empty: expected at least one batch. An iterator that was read to its "
    "end gives no more: make a new one."
)

_NO_STATS = (
    "variables has the collections {received}: expected 'batch_stats' among them. Pass "
    "{{'params': ..., 'batch_stats': ...}}, as model.init returns it."
)

_TOO_FEW = (
    "batch_stats/{path}: {features} of {size} feature(s) had fewer than two valid "
    "values in {where} (along the first axis: {rows}): expected at least two. Pass "
    "more data, or keep the layer as it is: keep=[{path!r}]."
)

_NOT_FINITE = (
    "batch_stats/{path}: the Moments of batch {number} (the first is 0) hold a NaN or "
    "an infinity: expected finite activations. Check the weights and that batch, or "
    "pass a mask."
)

_SCANNED = (
    "progress=True with stacked=True: expected one of them, for one compiled scan "
    "reports nothing on its way. Write stacked=False: arrays are iterated over, too."
)

_NO_RICH = "progress=True needs rich: expected it to be installed. pip install rich"

ApplyFn = Callable[[Any, Any], Any]


class _Average(NamedTuple):
    """A weighted average, (feature,): float64, the mean complex for complex values."""

    weight: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def algorithm_2(
    apply_fn: ApplyFn,
    variables: Any,
    batches: Any,
    *,
    keep: Sequence[str] = (),
    stacked: bool = False,
    progress: bool = False,
) -> Any:
    """Population statistics by the paper's Algorithm 2.

        mean = E_B[mean_B],   var = E_B[m/(m-1) var_B],   m the values of a batch

    Every batch has the same weight, even a smaller last one. Batches with fewer than
    two values of a feature do not count for it, as they have no unbiased variance.

    Args:
        apply_fn: (variables, batch) -> what the model's `apply` returns with
            `mutable=["batch_stats", "batch_moments"]`, or only the collection
            `batch_moments` of it. Compiled once per shape of batch; pass the same
            function again, not a new lambda, to compile nothing again.
        variables: the variables of the model, with "batch_stats". The parameters may
            be averages over training.
        batches: an iterable of batches. A batch may be smaller than the others, and
            its arrays may be split over devices.
        keep: patterns of the paths of layers that stay as they are ("encoder/*").
        stacked: whether `batches` is a tree of arrays that have the batches along their
            leading axis, (batches, batch, ...). One compiled scan runs over them and
            holds the Moments of all batches.
        progress: whether to show a progress bar; needs rich.

    Returns:
        New `batch_stats`, of the same structure, dtypes and devices.

    Raises:
        TypeError: `apply_fn` returns no Moments.
        ValueError: no batch; a layer that left no Moments; one with other shapes than
            `batch_stats` has; a feature with fewer than two values; a NaN.

    >>> import bnjax
    >>> layer = bnjax.BatchNorm(use_running_average=False)
    >>> batches = np.array([[[1.0], [3.0]], [[5.0], [9.0]]], np.float32)
    >>> variables = layer.init(jax.random.key(0), batches[0])
    >>> def collect(variables, x):
    ...     return layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    >>> print(algorithm_2(collect, variables, batches))
    {'mean': Array([4.5], dtype=float32), 'var': Array([5.], dtype=float32)}

    References: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 10.
    """

    def average(count: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> _Average:
        unbiased = m2 / np.where(count > 1, count - 1, 1)
        return _Average((count > 1).astype(np.float64), mean, unbiased)

    batch_moments = _moments_of_batches(apply_fn, variables, batches, stacked, progress)
    averages = _averages(batch_moments, average, between=False)
    return _new_batch_stats(
        variables, averages, keep, least_weight=1, where="each of the batches"
    )


def pooled(
    apply_fn: ApplyFn,
    variables: Any,
    batches: Any,
    *,
    keep: Sequence[str] = (),
    stacked: bool = False,
    progress: bool = False,
) -> Any:
    """Population statistics as the mean and the variance of all values.

        mean = E[mean_B],   var = E[mean_B^2 + var_B] - E[mean_B]^2

    Batches are weighted by their numbers of values, and the variance is biased. The
    batches' Moments are merged in float64, so that the result does not depend on how
    the data is split. (In deeper layers it does: their inputs were normalized with the
    statistics of each batch.)
    At |mean|/std = 1e4 the relative error of the variance of n values in all is about
    6e-4/sqrt(n), from the float32 means of the batches: 1e-5 is met with 10^4 values.

    Args:
        apply_fn: (variables, batch) -> what the model's `apply` returns with
            `mutable=["batch_stats", "batch_moments"]`, or only the collection
            `batch_moments` of it. Compiled once per shape of batch; pass the same
            function again, not a new lambda, to compile nothing again.
        variables: the variables of the model, with "batch_stats". The parameters may
            be averages over training.
        batches: an iterable of batches. A batch may be smaller than the others, and
            its arrays may be split over devices.
        keep: patterns of the paths of layers that stay as they are ("encoder/*").
        stacked: whether `batches` is a tree of arrays that have the batches along their
            leading axis, (batches, batch, ...). One compiled scan runs over them and
            holds the Moments of all batches.
        progress: whether to show a progress bar; needs rich.

    Returns:
        New `batch_stats`, of the same structure, dtypes and devices.

    Raises:
        TypeError: `apply_fn` returns no Moments.
        ValueError: no batch; a layer that left no Moments; one with other shapes than
            `batch_stats` has; a feature with fewer than two values; a NaN.

    >>> import bnjax
    >>> layer = bnjax.BatchNorm(use_running_average=False)
    >>> batches = np.array([[[1.0], [3.0]], [[5.0], [9.0]]], np.float32)
    >>> variables = layer.init(jax.random.key(0), batches[0])
    >>> def collect(variables, x):
    ...     return layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
    >>> print(pooled(collect, variables, batches, stacked=True))
    {'mean': Array([4.5], dtype=float32), 'var': Array([8.75], dtype=float32)}

    References: Wu & Johnson 2021, section 3.1 (PreciseBN); Chan, Golub & LeVeque 1979.
    """

    def average(count: np.ndarray, mean: np.ndarray, m2: np.ndarray) -> _Average:
        return _Average(count, mean, m2 / np.where(count > 0, count, 1))

    batch_moments = _moments_of_batches(apply_fn, variables, batches, stacked, progress)
    averages = _averages(batch_moments, average, between=True)
    return _new_batch_stats(
        variables, averages, keep, least_weight=2, where="all batches together"
    )


def _moments_of_batches(
    apply_fn: ApplyFn, variables: Any, batches: Any, stacked: bool, progress: bool
) -> Iterator[dict[str, Moments]]:
    """The Moments that each batch leaves, by layer."""
    if "batch_stats" not in variables:
        raise ValueError(_NO_STATS.format(received=sorted(variables)))
    if stacked and progress:
        raise ValueError(_SCANNED)
    if stacked:
        rows = jax.device_get(_scan(apply_fn, variables, batches))
        for i in range(len(jax.tree.leaves(batches)[0])):
            yield jax.tree.map(lambda value, i=i: value[i], rows)
        return
    for batch in _tracked(batches) if progress else batches:
        yield jax.device_get(_call(apply_fn, variables, batch))


@functools.partial(jax.jit, static_argnums=0)
def _call(apply_fn: ApplyFn, variables: Any, batch: Any) -> dict[str, Moments]:
    return _trees.moments_of(apply_fn(variables, batch), "apply_fn")


@functools.partial(jax.jit, static_argnums=0)
def _scan(apply_fn: ApplyFn, variables: Any, batches: Any) -> dict[str, Moments]:
    leaves, structure = jax.tree.flatten(variables)

    def one(_, batch):
        # NNX's variables belong to one trace: each gets new ones.
        fresh = jax.tree.unflatten(structure, leaves)
        return None, _trees.moments_of(apply_fn(fresh, batch), "apply_fn")

    return lax.scan(one, None, batches)[1]


def _tracked(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from rich.progress import track  # not a dependency of the library
    except ImportError:
        raise ImportError(_NO_RICH) from None
    return track(batches, description="population statistics")


def _averages(
    batch_moments: Iterable[dict[str, Moments]],
    average: Callable[..., _Average],
    *,
    between: bool,
) -> dict[str, _Average]:
    """The averages over all batches, by layer."""
    averages: dict[str, _Average] = {}
    for number, layers in enumerate(batch_moments):
        for path, batch in layers.items():
            wide = _wide(batch)
            if not all(np.isfinite(value).all() for value in wide):
                raise ValueError(_NOT_FINITE.format(path=path, number=number))
            new = average(*wide)
            old = averages.get(path)
            averages[path] = new if old is None else _merged(old, new, between)
    if not averages:
        raise ValueError(_NO_BATCH)
    return averages


def _wide(batch: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The Moments in double precision, the counts per feature."""
    count, mean, m2 = map(np.asarray, batch)
    count = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    count = np.broadcast_to(count, mean.shape).astype(np.float64)
    wide = np.complex128 if np.iscomplexobj(mean) else np.float64
    return count, mean.astype(wide), m2.astype(np.float64)


def _merged(a: _Average, b: _Average, between: bool) -> _Average:
    """The average of both; `between` adds the variance of the two means."""
    weight = a.weight + b.weight
    share = b.weight / np.where(weight > 0, weight, 1)
    d = b.mean - a.mean
    var = a.var + (b.var - a.var) * share
    if between:
        var = var + np.abs(d) ** 2 * share * (1 - share)
    return _Average(weight, a.mean + d * share, var)


def _new_batch_stats(
    variables: Any,
    averages: dict[str, _Average],
    keep: Sequence[str],
    least_weight: int,
    where: str,
) -> Any:
    """New `batch_stats`; raises for a feature of less weight than `least_weight`."""

    def update(path: str, mean: Any, var: Any):
        too_few = averages[path].weight < least_weight
        if too_few.any():
            message = _TOO_FEW.format(
                path=path,
                features=too_few.sum(),
                size=too_few.size,
                where=where,
                rows=np.unique(np.nonzero(np.atleast_1d(too_few))[0]),
            )
            raise ValueError(message)
        return averages[path].mean, averages[path].var

    stored = variables["batch_stats"]
    new = _trees.updated(stored, averages, update, keep)
    return jax.tree.map(_placed, new, stored)


def _placed(value: jax.Array, stored: Any) -> jax.Array:
    """`value` on the devices of what it replaces."""
    if not getattr(stored, "committed", False):
        return value
    return jax.device_put(value, stored.sharding)
