"""The moments of one batch, from sums that wait for nothing computed from it.

    s1 = sum d,   s2 = sum |d|^2,   d = x - shift        (valid values, by weight)
    mean = shift + s1/n,   m2 = s2 - |s1|^2/n

The shift is known before `x` is: the running mean of the layer, or 0. Then

* a compiler can take the sums where `x` is produced. On a TPU they become part of the
  convolution, while its output is still on the chip: no read of `x` at all. A shift
  taken from `x` would prevent that, and cost a read in every layer;
* replicas that know the same shift exchange plain sums, 2C numbers in one collective.

The variance loses a factor of 1 + (mean - shift)^2/var in precision. Where that is too
much for a feature, `x` is read again: for its mean, then for the sums about the mean.
Means within 3 standard deviations of the shift never need that. All replicas decide
from the same sums, so they take the same branch of the condition.

What differs by platform:

    TPU   as above: a branch that is not taken costs nothing.
    CPU   the first sums are about 0, which takes two thirds of the time of sums about a
          shift; the mean is known then.
    GPU   the host would have to wait for the condition. Convolutions are kernels of
          their own, so nothing is lost by a shift taken from `x`: the mean of a
          subsample, which is near enough to the mean whatever the data. Only where
          several GPUs need a shift in common, it is as on a TPU.

Which values count is said by one array, the mask. It is boolean; or real, and then its
values are weights w >= 0, of which 0 is False and 1 is True:

    n = sum w,   sum w d,   sum w |d|^2

References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
section 3 (shifted data).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from bnjax import _axes, _backend, _dtypes, _replicas
from bnjax.moments._moments import (
    Moments,
    abs_product,
    broadcast_count,
    drop_last_bit,
    mean_from_sum,
    two_sum,
)

# Beyond it, what does not count is read as 0.
_GARBAGE = 1e9

# Sums are exact enough where (mean - shift)^2 <= _LOSS var: the variance is right to
# 4e-6. A shift this near to the mean, relative to it, is as good as float32 can tell:
# a feature that is constant has no variance to compare with.
_LOSS = 9
_NEAR = 3e-5

# The shift on a GPU is the mean of one value in this many; of four values at least.
_SUBSAMPLE, _FEWEST = 32, 4

Sums = Callable[[jax.Array | None], tuple[jax.Array, jax.Array]]


class ReductionSpec(NamedTuple):
    """What is reduced, and over which replicas; static.

    Attributes:
        axes: the axes to reduce, ascending.
        storage: the dtype that the input had before it was widened.
        axis_name: the named axis or axes to merge over, bound; or None.
        groups: a partition of the named axis, or None.
        implementation: see `_backend`.
        local: whether no set of values lies on several devices, nor is to.
    """

    axes: tuple[int, ...]
    storage: jnp.dtype
    axis_name: str | tuple[str, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    implementation: str | None = None
    local: bool = False


def sums_about(
    x: jax.Array,
    mask: jax.Array | None,
    centre: jax.Array | None,
    spec: ReductionSpec,
) -> tuple[jax.Array, jax.Array]:
    """sum w d and sum w |d|^2 over the valid values, d = x - centre; None for 0."""
    first = _fresh(x, centre, spec)
    again = _fresh(*first, spec)
    values = multiply_by_weights(_deviation(*first, mask, spec), mask)
    d = _deviation(*again, mask, spec)
    squares = abs_product(d, multiply_by_weights(d, mask))
    several_axes = x.ndim - len(spec.axes) > 1
    if spec.implementation == "subsample" and several_axes:
        return _sums_together(values, squares, spec.axes)
    return values.sum(spec.axes), squares.sum(spec.axes)


def _sums_together(x: jax.Array, y: jax.Array, axes: tuple[int, ...]):
    """Both sums, as one reduction.

    XLA:GPU chooses the layout of the input of a sum by that of the result, and for a
    result of (group, feature) may write a transposed float32 copy of x. It keeps the
    layout of the input of a reduction that has two results.
    """
    zeros = jnp.zeros((), x.dtype), jnp.zeros((), y.dtype)

    def add(a, b):
        return a[0] + b[0], a[1] + b[1]

    return tuple(lax.reduce((x, y), zeros, add, axes))


def deviation(
    x: jax.Array, mask: jax.Array | None, mean: jax.Array, spec: ReductionSpec
) -> tuple[jax.Array, jax.Array | None]:
    """x - mean, and 0 where it has no derivative; and where: one more read of `x`."""
    x, centre = _fresh(x, mean, spec)
    where = gradient_mask(x, mask)
    return _deviation(x, centre, where, spec), where


def count_valid(
    x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array:
    """The sum of the weights; (feature,) where the mask varies by feature."""
    dtype = _dtypes.real(x.dtype)
    if mask is None:
        return jnp.full((), math.prod(x.shape[a] for a in axes), dtype)
    repeats = math.prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    flags = math.prod(mask.shape[a] for a in axes)
    # Where jit splits the batch, sums of one dtype are sent together.
    exact = isinstance(flags, int) and flags <= 1 / jnp.finfo(dtype).eps
    exact = exact or is_weighted(mask)
    counts = mask.sum(axes, dtype=dtype if exact else jnp.int32).astype(dtype)
    counts = counts * jnp.asarray(repeats, dtype)
    if counts.size == 1:
        return counts.reshape(())
    return jnp.broadcast_to(
        counts, _axes.sizes(x.shape, _axes.complement(axes, x.ndim))
    )


def mask_with_weights(
    x: jax.Array, mask: jax.Array | None, weights: jax.Array | None
) -> jax.Array | None:
    """One array for both, checked already: see the module."""
    if weights is None:
        return mask
    weights = weights.astype(_dtypes.real(_dtypes.statistics(x.dtype)))
    if mask is not None:
        shape = jnp.broadcast_shapes(mask.shape, weights.shape)
        weights = jnp.broadcast_to(weights, shape)
    weights = _axes.split_like(x, weights)  # JAX transposes no product of two splits
    if mask is None:
        return weights
    return _axes.where(mask, weights, jnp.zeros((), weights.dtype))


def is_weighted(mask: jax.Array | None) -> bool:
    """Whether it holds weights."""
    return mask is not None and mask.dtype != bool


def multiply_by_weights(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """w x; only `zero_where_masked` values may be summed."""
    return x * mask.astype(x.dtype) if mask is not None and is_weighted(mask) else x


def zero_where_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` with 0 where the mask is False."""
    if mask is None:
        return x
    return _axes.where(mask.astype(bool), x, jnp.zeros((), x.dtype))


def valid_or_finite(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Where `x` counts, or is no garbage: NaN, infinity, huge padding.

    The square and cube of what is left, times those of rstd, must not overflow: a
    derivative multiplies them by 0, the cotangent of what does not count.
    """
    limit = min(_GARBAGE, float(jnp.finfo(x.dtype).max))
    return mask.astype(bool) | (jnp.abs(x) <= limit)


def gradient_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Where sums depend on `x` or on its weight; on a weight of 0 as on any other."""
    return valid_or_finite(x, mask) if mask is not None and is_weighted(mask) else mask


def _deviation(
    x: jax.Array,
    centre: jax.Array | None,
    mask: jax.Array | None,
    spec: ReductionSpec,
) -> jax.Array:
    """x - centre, and 0 where the mask is False.

    There the centre is put for `x` before the subtraction: of 0 put behind it XLA:GPU
    may write an array as large as x, before it sums.
    """
    if centre is None:
        return zero_where_masked(x, mask)
    centre = _axes.expand(centre, _axes.complement(spec.axes, x.ndim), x.ndim)
    return (x if mask is None else _axes.where(mask.astype(bool), x, centre)) - centre


def _fresh(x: jax.Array, centre: jax.Array | None, spec: ReductionSpec):
    """Both, for one more sum: see `_backend.reread`."""
    vectors = [] if centre is None else [centre]
    values = _replicas.cast_together(x, *vectors)
    x, *vectors = _backend.reread(spec.storage, spec.implementation, *values)
    return x, vectors[0] if vectors else None


def batch_moments(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    spec: ReductionSpec,
) -> tuple[Moments, jax.Array]:
    """The Moments over every replica, and what the rounded mean lacks.

    At |mean|/std = 1e4 that is 1e-3 of a standard deviation, and the distances between
    the means of several sets of values need it.
    """
    features = _axes.complement(spec.axes, x.ndim)
    zero = jnp.zeros(_axes.sizes(x.shape, features), x.dtype)
    shift = _finite(shift, spec.axis_name, zero)

    count = count_valid(x, mask, spec.axes)
    if spec.axis_name is None:
        # JAX batches a condition in a typed shard_map only if all that its branches use
        # varies over the same axes.
        if mask is None:
            x, shift = _replicas.cast_together(x, shift)
        else:
            x, shift, mask = _replicas.cast_together(x, shift, mask)
    split = _replicas.split_by_jit(x)
    local = _is_local(x, spec)

    def taken_by(implementation):
        known = spec._replace(implementation=implementation)
        if known.axis_name is not None:
            return functools.partial(_of_batch, spec=known)
        if local if split else implementation == "subsample":
            return functools.partial(_subsampled, spec=known)
        return functools.partial(_batched_together, spec=known)

    choose = _backend.by_platform(spec.implementation, taken_by)
    return choose(x, mask, shift, count)


def _subsampled(x, mask, shift, count, spec: ReductionSpec):
    """The Moments from sums about the mean of a subsample; see `_subsample_mean`."""
    shift = _subsample_mean(x, mask, spec)
    return _from_sums(count, shift, *sums_about(x, mask, shift, spec))


def _batched_together(x, mask, shift, count, spec: ReductionSpec):
    """The guarded Moments; a batch of them has one condition for all.

    A condition for each would be a selection, with both of its sides computed.
    """

    @jax.custom_batching.custom_vmap
    def guarded(x, mask, shift, count):
        (_, mean, m2), rest = _of_batch(x, mask, shift, count, spec)
        return mean, m2, rest

    @guarded.def_vmap
    def _(size, batched, x, mask, shift, count):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        (_, mean, m2), rest = _of_batch(x, mask, shift, count, spec, size, axes)
        return (mean, m2, rest), (True, True, True)

    mean, m2, rest = guarded(x, mask, shift, count)
    return Moments(count, mean, m2), rest


def _is_local(x: jax.Array, spec: ReductionSpec) -> bool:
    """Whether no sum is one over several devices, as far as is known."""
    kinds = set(jax.typeof(x).sharding.mesh.axis_types)
    typed = kinds == {AxisType.Explicit}
    split = any(_replicas.typed_parts(x, a) > 1 for a in spec.axes)
    return spec.local or (typed and not split)


def _of_batch(
    x,
    mask,
    shift,
    count,
    spec: ReductionSpec,
    size: int | None = None,
    axes=(),
) -> tuple[Moments, jax.Array]:
    """The guarded Moments; or those of `size` batches, along the `axes` of vmap."""

    def each(function, *axes):
        return function if size is None else jax.vmap(function, axes, axis_size=size)

    # The condition is given x as it is stored, not a widened copy.
    stored = x if jnp.iscomplexobj(x) else x.astype(spec.storage)
    dtype = x.dtype

    def sums(centre):
        def one(stored, mask, centre):
            return sums_about(stored.astype(dtype), mask, centre, spec)

        along = None if centre is None else 0
        return each(one, *axes[:2], along)(stored, mask, centre)

    def first(x, mask, shift):
        if spec.implementation == "reread":
            return jnp.zeros_like(shift), *sums_about(x, mask, None, spec)
        return shift, *sums_about(x, mask, shift, spec)

    if size is not None and axes[3] is None:
        count = jnp.broadcast_to(count, (size, *count.shape))
    return _guarded(
        sums,
        count,
        each(first, *axes[:3])(x, mask, shift),
        spec.axis_name,
        spec.groups,
        spec.implementation,
        same_count=mask is None,
    )


def merged_rows(
    rows: Moments,
    axis_name: _replicas.AxisName | None = None,
    groups: _replicas.Groups | None = None,
    *,
    mean_errors: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> Moments:
    """The merge of rows of Moments, and of those of every replica.

    Args:
        rows: of sets of values; their axis leads.
        axis_name: of the replicas to merge over, or None.
        groups: a partition of that axis, or None.
        mean_errors: what each rounded mean lacks, if known.
        shift: see the module; of the shape of the merged mean.
    """

    def sums(centre):
        d = rows.mean if centre is None else rows.mean - centre[None]
        d = d if mean_errors is None else d + mean_errors
        weighted = broadcast_count(rows.count, d) * d
        return weighted.sum(0), (rows.m2 + abs_product(d, weighted)).sum(0)

    count = rows.count.sum(0)
    zero = jnp.zeros(rows.mean.shape[1:], rows.mean.dtype)
    if axis_name is None and not _replicas.split_by_jit(rows.mean):
        centre = drop_last_bit(mean_from_sum(sums(None)[0], count))
        return _from_sums(count, centre, *sums(centre))[0]
    shift = _finite(shift, axis_name, zero)
    return _guarded(sums, count, (shift, *sums(shift)), axis_name, groups, "xla")[0]


def _guarded(
    sums: Sums,
    count: jax.Array,
    first: tuple[jax.Array, jax.Array, jax.Array],
    axis_name: _replicas.AxisName | None,
    groups: _replicas.Groups | None,
    implementation: str | None,
    *,
    same_count: bool = False,
) -> tuple[Moments, jax.Array]:
    """The Moments from the first sums, or from those about the mean if it is far off.

    Args:
        sums: (centre) -> this replica's sum d and sum |d|^2 about it; None for 0.
        count: this replica's.
        first: a centre that is the same on every replica, and the sums about it.
        axis_name: of the replicas to sum over, or None.
        groups: a partition of that axis, or None.
        implementation: see `_backend`.
        same_count: whether every replica has that count, so that none is sent.
    """

    def total(*values):  # one row for each group of replicas, if there are groups
        return _replicas.packed_group_sums(values, axis_name, groups)

    def own(*rows):
        return _replicas.own_rows(rows, axis_name, groups)

    centre, s1, s2 = first
    centre = _axes.split_like(s1, centre)
    if same_count:
        s1, s2 = total(s1, s2)
        count = count * _replicas.group_sizes(axis_name, groups, count.dtype)
    else:
        count, s1, s2 = total(count, s1, s2)
    # All groups decide together: the collectives of the branch are of all replicas.
    exact = _exact(count, s1, s2, centre)
    count, s1, s2 = own(count, s1, s2)
    divisor = _replicas.cast_like(s1, count)

    def as_they_are():
        return _replicas.cast_together(centre, s1, s2)

    def about_the_mean():
        known = s1 if implementation == "reread" else own(*total(sums(None)[0]))[0]
        mean = drop_last_bit(mean_from_sum(known, divisor))
        return [mean, *own(*total(*sums(mean)))]

    def found(values):
        (_, mean, m2), rest = _from_sums(divisor, *values)
        return mean, m2, rest

    if implementation == "reread":  # else XLA:CPU takes the mean again for each value
        mean, m2, rest = lax.cond(
            exact, lambda: found(as_they_are()), lambda: found(about_the_mean())
        )
    else:  # a GPU computes both branches, unless one returns no more than it is given
        mean, m2, rest = found(lax.cond(exact, as_they_are, about_the_mean))
    return Moments(count, mean, m2), rest


def _from_sums(count, centre, s1, s2) -> tuple[Moments, jax.Array]:
    """The Moments and the rest of the mean, from the sums about a centre.

    Those of nothing have mean 0, whatever the centre.
    """
    centre = centre * broadcast_count(count > 0, centre)
    delta = mean_from_sum(s1, count)
    mean, rest = two_sum(centre, delta)
    m2 = jnp.maximum(s2 - abs_product(s1, delta), 0)
    return Moments(count, mean, m2), rest


def _exact(count, s1, s2, centre) -> jax.Array:
    """Whether the sums are exact enough for every feature, or cannot become finite."""
    delta = mean_from_sum(s1, count)
    square = abs_product(s1, delta)
    mean = jnp.broadcast_to(centre, delta.shape) + delta
    near = jnp.abs(delta) <= _NEAR * jnp.abs(mean)
    exact = (square <= _LOSS * (s2 - square)) | near | ~jnp.isfinite(delta)
    return jnp.all(exact)


def _finite(shift, axis_name, zero: jax.Array) -> jax.Array:
    """The shift, with 0 where it is not finite; 0 if replicas may have different ones.

    Only shard_map(check_vma=True) tells that a value is the same on every replica.
    """
    if shift is None or not _replicas.replicated(shift, axis_name):
        return zero
    if jnp.iscomplexobj(shift) and not jnp.iscomplexobj(zero):
        shift = shift.real
    return jnp.where(jnp.isfinite(shift), shift.astype(zero.dtype), zero)


def _subsample_mean(
    x: jax.Array, mask: jax.Array | None, spec: ReductionSpec
) -> jax.Array:
    """The mean of a fixed subsample: near enough to the mean, whatever the data.

    By Cauchy-Schwarz the mean over any K of N values lies within sqrt(N/K) standard
    deviations of the mean of all, outliers or not:
        (mean_K - mean)^2 <= (1/K) sum_K (x - mean)^2 <= (N/K) var
    so the shifted sums lose at most a factor 1 + N/K of precision. Along an axis that
    the mask varies by, of each N/K adjacent values the one of the largest weight is
    taken: so the bound holds among the valid, by weight.
    The slice is one of `x` as it is stored: a compiler may write what is sliced.
    """
    axes, dtype = spec.axes, x.dtype
    x = x if jnp.iscomplexobj(x) else x.astype(spec.storage)
    values = math.prod(x.shape[a] for a in axes)
    rest = _SUBSAMPLE
    if isinstance(values, int):
        rest = min(rest, max(values // _FEWEST, 1))
    masked = [a for a in axes if mask is not None and mask.shape[a] != 1]
    for a in [a for a in axes[1:] + axes[:1] if a not in masked] + masked:
        size = x.shape[a]
        if rest == 1 or _replicas.typed_parts(x, a) > 1:
            continue
        if a not in masked:
            x = lax.slice_in_dim(x, 0, size, stride=rest, axis=a)
        elif mask is not None and isinstance(size, int):
            x, mask = _one_in(rest, x, mask, a)
        else:
            continue
        rest = max(rest // max(size, 1), 1) if isinstance(size, int) else 1
    total = multiply_by_weights(zero_where_masked(x.astype(dtype), mask), mask).sum(
        axes
    )
    return drop_last_bit(mean_from_sum(total, count_valid(x.astype(dtype), mask, axes)))


def _one_in(
    number: int, x: jax.Array, mask: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Of each `number` values along the axis, the one of the largest weight; the mask.

    A boolean mask weighs 0 and 1.
    """
    size = x.shape[axis]
    padding = [(0, -size % number if a == axis else 0) for a in range(mask.ndim)]
    shape = list(mask.shape)
    shape[axis : axis + 1] = [-1, number]
    blocks = jnp.pad(mask, padding).reshape(shape)
    chosen = blocks.argmax(axis + 1)
    starts = jnp.arange(chosen.shape[axis], dtype=chosen.dtype) * number
    chosen = chosen + _axes.expand(starts, (axis,), mask.ndim)
    x = jnp.take_along_axis(x, chosen, axis, mode="promise_in_bounds")
    return x, blocks.max(axis + 1)
