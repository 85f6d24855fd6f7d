"""Co-moments: a count, a mean and the summed products of deviations.

Their merge; those of a batch, over all replicas; and the derivative.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _checks, _dtypes, _replicas
from bnjax.moments import (
    ReductionSpec,
    Union,
    compute_moments,
    count_valid,
    drop_last_bit,
    gradient_mask,
    is_weighted,
    is_zero,
    mask_with_weights,
    mean_from_sum,
    multiply_by_weights,
    name_for_remat,
    reduction_spec,
    variance_from_m2,
    zero_where_masked,
)
from bnjax.whiten import _layout
from bnjax.whiten._layout import Layout, outer


class CoMoments(NamedTuple):
    """How many vectors, their mean, and their summed products of deviations.

    Attributes:
        count: (), the number of vectors.
        mean: (feature,); at least float32.
        m2: (groups, size, size): sum (x - mean)(x - mean)^T within each group of
            adjacent features; groups * size features in all.

    >>> m2 = jnp.array([[[2.0, 4.0], [4.0, 8.0]]])
    >>> pair = CoMoments(2.0, jnp.array([2.0, 1.0]), m2)  # (1, -1) and (3, 3)
    >>> one = CoMoments(1.0, jnp.array([5.0, 1.0]), jnp.zeros((1, 2, 2)))
    >>> print(merge(pair, one).mean, merge(pair, one).m2.round(4))
    [3. 1.] [[[8. 4.] [4. 8.]]]
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    def covariance(self, ddof: int = 0) -> jax.Array:
        """The covariance m2 / (count - ddof): biased for ddof=0, unbiased for ddof=1.

        Args:
            ddof: subtracted from the count.

        Returns:
            (groups, size, size). Where count <= ddof there is no estimate, and the
            value is that of a single vector: 0.

        >>> m2 = jnp.array([[[8.0, 4.0], [4.0, 8.0]]])
        >>> print(CoMoments(3.0, jnp.zeros(2), m2).covariance(ddof=1))
        [[[4. 2.] [2. 4.]]]
        """
        return variance_from_m2(self.m2, self.count, ddof)

    @classmethod
    def empty(
        cls, groups: int, size: int, dtype: DTypeLike = jnp.float32
    ) -> "CoMoments":
        """The co-moments of nothing: the identity of `merge`.

        Args:
            groups: how many groups of features.
            size: how many features each group has.
            dtype: of all values.

        >>> CoMoments.empty(2, 3).m2.shape
        (2, 3, 3)
        """
        mean = jnp.zeros(groups * size, dtype)
        return cls(jnp.zeros((), dtype), mean, jnp.zeros((groups, size, size), dtype))


def merge(first: CoMoments, *rest: CoMoments) -> CoMoments:
    """The co-moments of the union of disjoint sets.

        n = n_a + n_b,  mean = mean_a + d n_b/n,  m2 = m2_a + m2_b + d d^T n_a n_b/n
        with d = mean_b - mean_a

    Args:
        first: CoMoments.
        *rest: CoMoments of the same groups.

    Returns:
        CoMoments. Merging with `CoMoments.empty` changes nothing. How far counts are
        right: see `bnjax.merge`.

    Raises:
        TypeError: something else than CoMoments.
        ValueError: CoMoments of other groups.

    >>> one = CoMoments(1.0, jnp.array([4.0, 7.0]), jnp.zeros((1, 2, 2)))
    >>> two = CoMoments(1.0, jnp.array([6.0, 1.0]), jnp.zeros((1, 2, 2)))
    >>> print(merge(one, two).m2)
    [[[ 2. -6.] [-6. 18.]]]

    References: Chan, Golub & LeVeque 1979, eq. 2.1, with outer products.
    """
    _checks.mergeable((first, *rest), CoMoments)
    return functools.reduce(_merge_two, rest, first)


def _merge_two(a: CoMoments, b: CoMoments) -> CoMoments:
    union = Union.of(a.count, b.count)
    d = (b.mean - a.mean).reshape(a.m2.shape[:-1])
    # The weight first: d^2 may overflow where one side is empty.
    between = outer(d, d * (union.share_a * union.share_b).astype(d.dtype))
    mean = union.blend(a.mean, b.mean)
    return CoMoments(union.count, mean, union.total(a.m2, b.m2, between))


class CoReductionSpec(NamedTuple):
    """What is reduced, and which features belong together; static."""

    reduction: ReductionSpec
    layout: Layout


def co_moments(
    x: ArrayLike,
    *,
    axis: int = -1,
    group_size: int | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    shift: ArrayLike | None = None,
) -> CoMoments:
    """The co-moments of `x`, exact over every replica of `axis_name`.

        count = sum w,  mean = sum w x / count,  m2 = sum w (x - mean)(x - mean)^T

    Two collectives: the mean first, because deviations from the mean of all can be
    summed, and no replica's matrix has to be gathered.
    The relative error of the covariance stays below 1e-5 in float32 at
    |mean|/std = 1e4. Differentiable in every mode and order.

    Args:
        x: (batch, *spatial, feature), floating.
        axis: the feature axis; all others are reduced.
        group_size: the features of a group, adjacent; None for one group of all.
        mask: boolean, broadcastable to `x`, with size 1 along the feature axis; True =
            counts. What lies under False, NaN included, changes nothing.
        weights: real floats >= 0, broadcastable as the mask: how often each position
            counts; see `bnjax.moments`. None for 1.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to merge over. Not
            needed under jit: the co-moments of a sharded batch are global there.
        axis_index_groups: a partition of that axis; replicas merge within their group.
            Groups may differ in size.
        shift: (feature,), a guess of the mean; see `moments`.

    Returns:
        CoMoments of `promote_types(x.dtype, float32)`.

    Raises:
        TypeError: `x` holds integers or complex numbers.
        ValueError: several feature axes, or one out of range; a group size that does
            not divide the features; a mask or weights that do not broadcast or vary by
            feature; a shift of another shape; an axis name that is not bound; groups
            that do not partition it.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 8.0], [5.0, 2.0]])
    >>> count, mean, m2 = co_moments(x)
    >>> print(count, mean, m2)
    3.0 [3. 4.] [[[ 8.  0.] [ 0. 24.]]]

    References: Chan, Golub & LeVeque 1979; Huang et al. 2018, eq. 3.
    """
    x = _layout.real("x", x)
    layout = _layout.layout(x, axis, group_size)
    mask = mask_with_weights(x, *_layout.positions(mask, weights, x, layout.axis))
    spec = CoReductionSpec(
        reduction_spec(x, axis, axis_name, axis_index_groups), layout
    )
    shift = _checks.shift(shift, (x.shape[layout.axis],), axis, x.dtype)
    return _co_moments(x, mask, shift, spec)


@functools.partial(jax.jit, static_argnums=3)
def _co_moments(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: CoReductionSpec
) -> CoMoments:
    return co_statistics(x.astype(_dtypes.statistics_dtype(x.dtype)), mask, shift, spec)


# The derivative. With c = x - mean, over the valid positions of every replica:
#     dmean = sum w dx / n,     dm2 = S + S^T,  S = sum w c dx^T
# because the terms through dmean vanish: sum w c = 0. One packed sum, so the transpose
# holds one collective, and the merge is never differentiated. Weights that vary add
#     dn = sum dw,     dmean = sum dw c / n,     S = sum dw c c^T / 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def co_statistics(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: CoReductionSpec
) -> CoMoments:
    """The co-moments of a widened `x`, differentiable; arguments are checked already.

    The mean is rounded at its own magnitude: the products are corrected by the mean
    deviation from it.
    """
    count, mean, _ = compute_moments(x, mask, shift, spec.reduction)
    d = _deviation(x, drop_last_bit(mean), mask, spec)
    d, weighed_d = (
        _layout.split(v, spec.layout) for v in (d, multiply_by_weights(d, mask))
    )
    s1, s2 = _total(
        (_sum(weighed_d), _layout.products(d, weighed_d)), x, spec.reduction
    )
    m2 = s2 - _layout.outer(s1, mean_from_sum(s1, count))
    return CoMoments(count, mean, m2)


@functools.partial(co_statistics.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    result = CoMoments._make(map(name_for_remat, co_statistics(*primals, spec)))
    where = gradient_mask(x, mask)
    d = _deviation(x, result.mean, where, spec)
    dx = _axes.split_like(x, jnp.zeros_like(x)) if is_zero(dx) else dx
    first = half = multiply_by_weights(zero_where_masked(dx, where), mask)
    counts = []
    if is_weighted(mask) and not is_zero(dw):
        first, half = first + d * dw, half + d * dw / 2
        counts.append(count_valid(x, dw, spec.reduction.axes))
    d, first, half = (_layout.split(v, spec.layout) for v in (d, first, half))
    sums = _sum(first), _layout.products(d, half), *counts
    s1, s2, *counts = _total(sums, x, spec.reduction)
    dn = jnp.zeros_like(result.count)
    if counts:  # nothing varies about what is given for an empty batch
        (dn,) = counts
        s1, s2 = (jnp.where(result.count > 0, s, 0) for s in (s1, s2))
    dmean = mean_from_sum(s1, result.count).ravel()
    dm2 = s2 + jnp.swapaxes(s2, -1, -2)
    return result, CoMoments(dn, dmean, dm2)


def _deviation(x, centre, where, spec: CoReductionSpec) -> jax.Array:
    """x - centre, and 0 where `where` is False."""
    x, centre = _replicas.pvary_together(x, centre)
    return zero_where_masked(
        x - _axes.expand(centre, (spec.layout.axis,), x.ndim), where
    )


def _sum(x: jax.Array) -> jax.Array:
    """The sum over positions: (groups, size)."""
    return x.sum(tuple(range(x.ndim - 2)))


def _total(sums, x: jax.Array, reduction: ReductionSpec):
    """The sums over the replicas; together also where jit communicates them."""
    if reduction.axis_name is None and not _replicas.may_span_devices(x):
        return sums
    return _replicas.packed_sum(sums, reduction.axis_name, reduction.groups)
