"""The moments of one batch, from sums that depend on no earlier reduction of it.

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
    CPU   the first sums are about 0: they take two thirds of the time of shifted sums,
          and give the mean for the second pass.
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

# Masked values larger than this are replaced by 0.
_MAX_MASKED_VALUE = 1e9

# The first sums are used where (mean - shift)^2 <= _MAX_SHIFT_SQUARED var: the variance
# is then right to 4e-6. A shift within _NEAR |mean| of the mean is accepted as well:
# float32 resolves no better, and a constant feature would fail the first test.
_MAX_SHIFT_SQUARED = 9
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
        implementation: see `batch_norm`.
        local: whether each reduction stays on one device.
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
    first = _reread_operands(x, centre, spec)
    again = _reread_operands(*first, spec)
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


def deviation_for_gradient(
    x: jax.Array, mask: jax.Array | None, mean: jax.Array, spec: ReductionSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Returns x - mean, 0 outside the gradient mask, and that mask. Reads `x` again."""
    x, centre = _reread_operands(x, mean, spec)
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
    # Count in float where that is exact: XLA can then combine this all-reduce with
    # those of the float sums.
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
    """Combines mask and weights into one array: the weights, 0 where the mask is False.

    Returns the mask if there are no weights. Both must have been checked.
    """
    if weights is None:
        return mask
    weights = weights.astype(_dtypes.real(_dtypes.statistics_dtype(x.dtype)))
    if mask is not None:
        shape = jnp.broadcast_shapes(mask.shape, weights.shape)
        weights = jnp.broadcast_to(weights, shape)
    weights = _axes.split_like(x, weights)  # JAX transposes no product of two splits
    if mask is None:
        return weights
    return _axes.where(mask, weights, jnp.zeros((), weights.dtype))


def is_weighted(mask: jax.Array | None) -> bool:
    """Returns whether the mask holds weights."""
    return mask is not None and mask.dtype != bool


def multiply_by_weights(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns w x. Apply `zero_where_masked` before summing."""
    return x * mask.astype(x.dtype) if mask is not None and is_weighted(mask) else x


def zero_where_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` with 0 where the mask is False."""
    if mask is None:
        return x
    return _axes.where(mask.astype(bool), x, jnp.zeros((), x.dtype))


def valid_or_bounded(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns where `x` is unmasked, or small enough not to overflow in a derivative.

    There the square and cube of a masked value, times those of rstd, are multiplied by
    its cotangent, 0.
    """
    limit = min(_MAX_MASKED_VALUE, float(jnp.finfo(x.dtype).max))
    return mask.astype(bool) | (jnp.abs(x) <= limit)


def gradient_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns where the derivative by `x` or by its weight may be nonzero.

    This includes weights of 0: the derivative by the weight does not vanish there.
    """
    return valid_or_bounded(x, mask) if mask is not None and is_weighted(mask) else mask


def _deviation(
    x: jax.Array,
    centre: jax.Array | None,
    mask: jax.Array | None,
    spec: ReductionSpec,
) -> jax.Array:
    """Returns x - centre, and 0 where the mask is False.

    Masked values are set to the centre before the subtraction. Zeroing the difference
    instead can make XLA:GPU write an array as large as x.
    """
    if centre is None:
        return zero_where_masked(x, mask)
    centre = _axes.expand(centre, _axes.complement(spec.axes, x.ndim), x.ndim)
    return (x if mask is None else _axes.where(mask.astype(bool), x, centre)) - centre


def _reread_operands(x: jax.Array, centre: jax.Array | None, spec: ReductionSpec):
    """Returns both behind a fence, so that the next sum reads `x` again on a CPU."""
    vectors = [] if centre is None else [centre]
    values = _replicas.pvary_together(x, *vectors)
    x, *vectors = _backend.reread(spec.storage, spec.implementation, *values)
    return x, vectors[0] if vectors else None


def batch_moments(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    spec: ReductionSpec,
) -> tuple[Moments, jax.Array]:
    """Returns the Moments over every replica, and the rounding error of the mean.

    The error reaches 1e-3 standard deviations at |mean|/std = 1e4. A merge needs it for
    the distances between the means.
    """
    features = _axes.complement(spec.axes, x.ndim)
    zero = jnp.zeros(_axes.sizes(x.shape, features), x.dtype)
    shift = _finite(shift, spec.axis_name, zero)

    count = count_valid(x, mask, spec.axes)
    if spec.axis_name is None:
        # JAX batches a condition in a typed shard_map only if all that its branches use
        # varies over the same axes.
        if mask is None:
            x, shift = _replicas.pvary_together(x, shift)
        else:
            x, shift, mask = _replicas.pvary_together(x, shift, mask)
    split = _replicas.may_be_sharded_by_jit(x)
    local = _is_local(x, spec)

    def moments_for(implementation):
        known = spec._replace(implementation=implementation)
        if known.axis_name is not None:
            return functools.partial(_moments_by_shift, spec=known)
        if local if split else implementation == "subsample":
            return functools.partial(_moments_by_subsample, spec=known)
        return functools.partial(_moments_by_shift_vmappable, spec=known)

    choose = _backend.by_platform(spec.implementation, moments_for)
    return choose(x, mask, shift, count)


def _moments_by_subsample(x, mask, shift, count, spec: ReductionSpec):
    """Returns the Moments from sums about the mean of a subsample."""
    shift = _subsample_mean(x, mask, spec)
    return _from_sums(count, shift, *sums_about(x, mask, shift, spec))


def _moments_by_shift_vmappable(x, mask, shift, count, spec: ReductionSpec):
    """As `_moments_by_shift`; under vmap all batches share one condition.

    A condition for each batch would become a select, which computes both branches.
    """

    @jax.custom_batching.custom_vmap
    def guarded(x, mask, shift, count):
        (_, mean, m2), rest = _moments_by_shift(x, mask, shift, count, spec)
        return mean, m2, rest

    @guarded.def_vmap
    def _(size, batched, x, mask, shift, count):
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        (_, mean, m2), rest = _moments_by_shift(x, mask, shift, count, spec, size, axes)
        return (mean, m2, rest), (True, True, True)

    mean, m2, rest = guarded(x, mask, shift, count)
    return Moments(count, mean, m2), rest


def _is_local(x: jax.Array, spec: ReductionSpec) -> bool:
    """Returns whether every sum is known to stay on one device."""
    kinds = set(jax.typeof(x).sharding.mesh.axis_types)
    typed = kinds == {AxisType.Explicit}
    split = any(_replicas.num_shards(x, a) > 1 for a in spec.axes)
    return spec.local or (typed and not split)


def _moments_by_shift(
    x,
    mask,
    shift,
    count,
    spec: ReductionSpec,
    size: int | None = None,
    axes=(),
) -> tuple[Moments, jax.Array]:
    """Returns the Moments; or those of `size` batches, along the `axes` of vmap."""

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
    return _moments_with_retry(
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
    """Merges rows of Moments, and the rows of every replica.

    Args:
        rows: of sets of values; their axis leads.
        axis_name: of the replicas to merge over, or None.
        groups: a partition of that axis, or None.
        mean_errors: the rounding error of each mean, if known.
        shift: see the module; of the shape of the merged mean.
    """

    def sums(centre):
        d = rows.mean if centre is None else rows.mean - centre[None]
        d = d if mean_errors is None else d + mean_errors
        weighted = broadcast_count(rows.count, d) * d
        return weighted.sum(0), (rows.m2 + abs_product(d, weighted)).sum(0)

    count = rows.count.sum(0)
    zero = jnp.zeros(rows.mean.shape[1:], rows.mean.dtype)
    if axis_name is None and not _replicas.may_be_sharded_by_jit(rows.mean):
        centre = drop_last_bit(mean_from_sum(sums(None)[0], count))
        return _from_sums(count, centre, *sums(centre))[0]
    shift = _finite(shift, axis_name, zero)
    return _moments_with_retry(
        sums, count, (shift, *sums(shift)), axis_name, groups, "xla"
    )[0]


def _moments_with_retry(
    sums: Sums,
    count: jax.Array,
    first: tuple[jax.Array, jax.Array, jax.Array],
    axis_name: _replicas.AxisName | None,
    groups: _replicas.Groups | None,
    implementation: str | None,
    *,
    same_count: bool = False,
) -> tuple[Moments, jax.Array]:
    """Returns the Moments from the first sums, or from a second pass about the mean.

    The second pass is for shifts that are too far from the mean.

    Args:
        sums: (centre) -> this replica's sum d and sum |d|^2 about it; None for 0.
        count: this replica's.
        first: a centre that is the same on every replica, and the sums about it.
        axis_name: of the replicas to sum over, or None.
        groups: a partition of that axis, or None.
        implementation: see `batch_norm`.
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
    exact = _shift_is_near_enough(count, s1, s2, centre)
    count, s1, s2 = own(count, s1, s2)
    divisor = _replicas.pvary_like(s1, count)

    def keep_first_sums():
        return _replicas.pvary_together(centre, s1, s2)

    def recompute_about_mean():
        known = s1 if implementation == "reread" else own(*total(sums(None)[0]))[0]
        mean = drop_last_bit(mean_from_sum(known, divisor))
        return [mean, *own(*total(*sums(mean)))]

    def found(values):
        (_, mean, m2), rest = _from_sums(divisor, *values)
        return mean, m2, rest

    if implementation == "reread":  # else XLA:CPU takes the mean again for each value
        mean, m2, rest = lax.cond(
            exact,
            lambda: found(keep_first_sums()),
            lambda: found(recompute_about_mean()),
        )
    else:  # a GPU computes both branches, unless one returns no more than it is given
        mean, m2, rest = found(lax.cond(exact, keep_first_sums, recompute_about_mean))
    return Moments(count, mean, m2), rest


def _from_sums(count, centre, s1, s2) -> tuple[Moments, jax.Array]:
    """Returns the Moments and the rounding error of the mean.

    From s1 = sum d and s2 = sum |d|^2, where d = x - centre. An empty set has mean 0,
    for any centre.
    """
    centre = centre * broadcast_count(count > 0, centre)
    delta = mean_from_sum(s1, count)
    mean, rest = two_sum(centre, delta)
    m2 = jnp.maximum(s2 - abs_product(s1, delta), 0)
    return Moments(count, mean, m2), rest


def _shift_is_near_enough(count, s1, s2, centre) -> jax.Array:
    """Returns whether the first sums are accurate enough for every feature.

    A feature that is not finite counts as accurate: a second pass would not help.
    """
    delta = mean_from_sum(s1, count)
    square = abs_product(s1, delta)
    mean = jnp.broadcast_to(centre, delta.shape) + delta
    near = jnp.abs(delta) <= _NEAR * jnp.abs(mean)
    exact = (square <= _MAX_SHIFT_SQUARED * (s2 - square)) | near | ~jnp.isfinite(delta)
    return jnp.all(exact)


def _finite(shift, axis_name, zero: jax.Array) -> jax.Array:
    """Returns the shift, 0 where it is not finite, or 0 if replicas may differ in it.

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
        if rest == 1 or _replicas.num_shards(x, a) > 1:
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
