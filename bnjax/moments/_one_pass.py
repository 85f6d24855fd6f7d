"""The moments of one replica's values, from one pass over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _axes, _backend, _dtypes, _replicas
from bnjax.moments._value import Moments, abs_product, coarse, displaced, mean_of

# The shift is the mean of one value in at most this many. See `_shift`.
_SUBSAMPLE = 32

# Plain sums are exact enough where mean^2 <= _LOSS var: the variance is right to 4e-6.
_LOSS = 9


class Reduction(NamedTuple):
    """What is reduced, and over which replicas; static.

    Attributes:
        axes: the axes to reduce, ascending.
        storage: the dtype that the input had before it was widened.
        axis_name: the named axis or axes to merge over, bound; or None.
        groups: a partition of the named axis, or None.
        implementation: see `_backend`.
        whole: whether no set of values is to be cut into parts: see `_parts`.
    """

    axes: tuple[int, ...]
    storage: jnp.dtype
    axis_name: str | tuple[str, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    implementation: str | None = None
    whole: bool = False


def one_pass(
    x: jax.Array, mask: jax.Array | None, how: Reduction
) -> tuple[Moments, jax.Array]:
    """The Moments, from one pass over `x`, and what the rounded mean lacks.

    At |mean|/std = 1e4 that is 1e-3 of a standard deviation, and the distances between
    the means of replicas need it.
    """
    count = _count(x, mask, how.axes)

    def shifted(x, mask, count):
        return _about(_shift(x, mask, how), count, x, mask, how)

    @jax.custom_batching.custom_vmap
    def guarded(x, mask, count):
        return _guarded(count, x, mask, how)

    @guarded.def_vmap
    def _(size, batched, *args):  # of a batch of conditions, both sides are computed
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        return jax.vmap(shifted, axes, axis_size=size)(*args), (True, True, True)

    choose = _backend.on_cpu(how.implementation, guarded, shifted)
    if _replicas.split_by_jit(x):  # the guard's sums would be communicated one by one
        choose = shifted
    mean, m2, rest = choose(x, mask, count)
    return Moments(count, mean, m2), rest


def _about(shift, count, x, mask, how: Reduction):
    """(mean, m2, rest), from the sums about a shift close to the mean."""
    return _of_sums(shift, count, *_sums(x, mask, shift, how))


def _sums(x, mask, centre, how: Reduction):
    """sum d and sum |d|^2, where d = x - centre."""
    x, about = reread(x, centre, how)
    s1 = valid(centred(x, about, how), mask).sum(how.axes)
    d = valid(centred(*reread(x, about, how), how), mask)
    return s1, abs_product(d, d).sum(how.axes)


def _of_sums(centre, count, s1, s2):
    """mean = centre + sum d / n,  m2 = sum |d|^2 - |sum d|^2 / n, and the rest."""
    delta = mean_of(s1, count)
    mean, rest = displaced(centre, delta)
    return mean, jnp.maximum(s2 - abs_product(s1, delta), 0), rest


def _guarded(count, x, mask, how: Reduction):
    """The same from the sums of x and |x|^2, where they are exact enough.

    On a CPU a sum of x takes a third of the time of a sum of x - shift. The variance
    has then lost a factor 1 + mean^2/var of precision; where that is too much for any
    feature, x is read again, about the mean that is known by now.
    """
    (once,) = _backend.reread(how.storage, how.implementation, x)
    s1 = valid(once, mask).sum(how.axes)
    again, s1 = reread(x, s1, how)
    again = valid(again, mask)
    s2 = abs_product(again, again).sum(how.axes)
    mean = mean_of(s1, count)
    square = abs_product(s1, mean)
    exact = jnp.all(square <= _LOSS * (s2 - square))  # not where inf - inf
    centre = coarse(mean)

    def plain(stored):
        return s1, s2

    def about_the_mean(stored):
        return _sums(stored.astype(x.dtype), mask, centre, how)

    # A branch is compiled if it is taken or not: what follows the sums is outside.
    stored = x if jnp.iscomplexobj(x) else x.astype(how.storage)  # not a widened copy
    sums = lax.cond(exact, plain, about_the_mean, stored)
    total, m2, rest = _of_sums(centre, count, *sums)
    zero = jnp.zeros_like(rest)
    return jnp.where(exact, mean, total), m2, jnp.where(exact, zero, rest)


def _shift(x: jax.Array, mask: jax.Array | None, how: Reduction) -> jax.Array:
    """The mean of a fixed subsample: near enough to the mean, whatever the data.

    By Cauchy-Schwarz the mean over any K of N values lies within sqrt(N/K) standard
    deviations of the mean of all, outliers or not:
        (mean_K - mean)^2 <= (1/K) sum_K (x - mean)^2 <= (N/K) var
    so the shifted sums lose at most a factor 1 + N/K of precision. An axis along
    which the mask varies is kept whole, or N/K would not hold among the valid; and so
    is one that is typed as sharded, because a slice of it would be communicated.
    """
    values = math.prod(x.shape[a] for a in how.axes)
    rest = (
        min(_SUBSAMPLE, max(values // _SUBSAMPLE, 1))
        if isinstance(values, int)
        else _SUBSAMPLE
    )
    for a in how.axes[1:] + how.axes[:1]:  # the batch last: it may be sharded
        if rest == 1 or (mask is not None and mask.shape[a] != 1) or _sharded(x, a):
            continue
        size = x.shape[a]
        x = lax.slice_in_dim(x, 0, size, stride=rest, axis=a)
        rest = max(rest // max(size, 1), 1) if isinstance(size, int) else 1
    count = _count(x, mask, how.axes)
    return coarse(mean_of(valid(x, mask).sum(how.axes), count))


def _sharded(x: jax.Array, axis: int) -> bool:
    """Whether `x` is typed (Explicit mesh axes) as split along `axis`."""
    return jax.typeof(x).sharding.spec[axis] is not None


def _count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """The number of valid values; (feature,) where the mask varies by feature."""
    dtype = _dtypes.real(x.dtype)
    if mask is None:
        return jnp.full((), math.prod(x.shape[a] for a in axes), dtype)
    repeats = math.prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    counts = mask.sum(axes, dtype=jnp.int32).astype(dtype) * jnp.asarray(repeats, dtype)
    if counts.size == 1:
        return counts.reshape(())
    return jnp.broadcast_to(
        counts, _axes.sizes(x.shape, _axes.complement(axes, x.ndim))
    )


def valid(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` with 0 where the mask is False."""
    return x if mask is None else _axes.where(mask, x, jnp.zeros((), x.dtype))


def centred(x: jax.Array, centre: jax.Array, how: Reduction) -> jax.Array:
    return x - _axes.expand(centre, _axes.complement(how.axes, x.ndim), x.ndim)


def reread(
    x: jax.Array, vector: jax.Array, how: Reduction
) -> tuple[jax.Array, jax.Array]:
    values = _replicas.cast_together(x, vector)
    x, vector = _backend.reread(how.storage, how.implementation, *values)
    return x, vector
