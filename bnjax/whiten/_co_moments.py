"""Co-moments: a count, a mean and the summed products of deviations.

The groups of features whose deviations are multiplied; the merge; the co-moments of a
batch, over all replicas; and their derivative.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _checks, _dtypes, _replicas
from bnjax.moments import (
    ReductionSpec,
    Union,
    compute_moments,
    count_valid,
    deviation,
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

HIGHEST = lax.Precision.HIGHEST


# Groups of adjacent features, and the products within them.


class Layout(NamedTuple):
    """The feature axis, the number of groups, and the features of each; static."""

    axis: int
    groups: int
    size: int


def layout_of(x: jax.Array, axis: int, group_size: int | None) -> Layout:
    """The layout of `x`, checked; one group of all features for group_size=None."""
    axes = _axes.canonical(axis, x.ndim)
    if len(axes) != 1:
        raise ValueError(
            f"axis={axis!r} names {len(axes)} axes: expected one feature axis, whose "
            "features are whitened together. Reshape those axes to one first."
        )
    features = x.shape[axes[0]]
    if features == 0:
        raise ValueError(
            f"the input has shape {tuple(x.shape)}, with 0 features (axis={axis!r}): "
            "expected at least one to whiten. Leave the layer out where there are none."
        )
    size = features if group_size is None else operator.index(group_size)
    if size < 1 or features % size:
        raise ValueError(
            f"group_size={group_size!r} does not divide the {features} features of "
            f"the input's shape {tuple(x.shape)} (axis={axis!r}): expected groups of "
            "equal size. Write group_size=None for one group of all features, or a "
            "divisor of their number."
        )
    return Layout(axes[0], features // size, size)


def require_real(name: str, x: ArrayLike) -> jax.Array:
    """`x` as a JAX array of a real floating dtype."""
    x = _checks.require_inexact(name, x)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"{name} has dtype {x.dtype}: expected a real floating dtype, for complex "
            "values are not whitened here. Write "
            f"{name}.real, or stack {name}.real and {name}.imag as two features."
        )
    return x


def require_real_result(
    dtype: DTypeLike | None, **parameters: ArrayLike | None
) -> None:
    """Raises where the output would be complex."""
    for name, value in parameters.items():
        if jnp.iscomplexobj(value):
            require_real(name, jnp.asarray(value))
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"dtype={jnp.dtype(dtype).name} is the dtype of the output: expected a "
            "real one. Write dtype=None to infer it from the input."
        )


def mask_and_weights(
    mask: ArrayLike | None, weights: ArrayLike | None, x: jax.Array, axis: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Both in the rank of `x`, checked: they may not vary by feature."""
    flags, numbers = _checks.mask(mask, x.shape), _checks.weights(weights, x.shape)
    for name, received, value, cure in (
        ("mask", mask, flags, "all"),
        ("weights", weights, numbers, "min"),
    ):
        if received is not None and value is not None and value.shape[axis] != 1:
            raise ValueError(
                f"{name} has shape {jnp.shape(received)}, which varies along the "
                f"feature axis {axis} of the input's shape {tuple(x.shape)}: expected "
                "size 1 there, for a covariance needs both of its features. Write "
                f"{name}.{cure}(axis={axis}, keepdims=True)."
            )
    return flags, numbers


def group_covariances(value: ArrayLike | None, spec: Layout) -> jax.Array:
    """A real (size, size) matrix for each group; the identity where `value` is None."""
    shape = (spec.groups, spec.size, spec.size)
    if value is None:
        return jnp.broadcast_to(jnp.eye(spec.size), shape)
    value = require_real("covariance", value)
    if value.shape != shape:
        raise ValueError(
            f"covariance has shape {value.shape}: expected {shape}, a matrix for each "
            f"group of {spec.size} features. Write group_size=... as in the "
            "statistics, or covariance[None] for a single group."
        )
    return value


def group_size_of(covariance: jax.Array) -> int:
    """The number of features in a group, by the shape of a covariance."""
    if covariance.ndim != 3 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(
            f"covariance has shape {covariance.shape}: expected (groups, size, size), "
            "a matrix for each group. Write covariance[None] for a single group."
        )
    return covariance.shape[-1]


def split_groups(x: jax.Array, spec: Layout) -> jax.Array:
    """`x` as (..., groups, size): the features last, and in their groups."""
    x = jnp.moveaxis(x, spec.axis, -1)
    return x.reshape(*x.shape[:-1], spec.groups, spec.size)


def _join_groups(x: jax.Array, spec: Layout) -> jax.Array:
    """The inverse of `split_groups`."""
    x = x.reshape(*x.shape[:-2], spec.groups * spec.size)
    return jnp.moveaxis(x, -1, spec.axis)


def summed_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum a b^T over all positions of (..., groups, size): (groups, size, size)."""
    positions = tuple(range(a.ndim - 2))
    group = (a.ndim - 2,)
    sharding = jax.typeof(a).sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return lax.dot_general(
        a,
        b,
        ((positions, positions), (group, group)),
        precision=HIGHEST,
        out_sharding=replicated if any(sharding.spec) else None,  # Explicit axes
    )


def outer_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T of two vectors for each group."""
    return a[..., :, None] * b[..., None, :]


def multiply_groups(matrices: jax.Array, x: jax.Array, spec: Layout) -> jax.Array:
    """Multiplies the features of each group by its matrix; subtracts no mean."""
    y = jnp.einsum(
        "gij,...gj->...gi", matrices, split_groups(x, spec), precision=HIGHEST
    )
    return _join_groups(y, spec)


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
            dtype: the dtype of all values.

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
        CoMoments. Merging with `CoMoments.empty` changes nothing. `bnjax.merge` says up
        to which number counts are exact.

    Raises:
        TypeError: arguments that are no CoMoments.
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
    between = outer_products(d, d * (union.share_a * union.share_b).astype(d.dtype))
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

    Two collectives: first the mean over all replicas. Deviations from that mean can be
    summed, so that no matrix of a replica has to be gathered.
    The relative error of the covariance stays below 1e-5 in float32 at
    |mean|/std = 1e4. Differentiable in every mode and order.

    Args:
        x: (batch, *spatial, feature), floating.
        axis: the feature axis; all others are reduced.
        group_size: the number of adjacent features in a group; None for one group.
        mask: boolean, broadcastable to `x`, with size 1 along the feature axis; True =
            counts. Values under False, NaN included, change nothing.
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
    x = require_real("x", x)
    layout = layout_of(x, axis, group_size)
    mask = mask_with_weights(x, *mask_and_weights(mask, weights, x, layout.axis))
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
    (count, mean, _), _ = compute_moments(x, mask, shift, spec.reduction)
    operand, centre = _replicas.pvary_together(x, drop_last_bit(mean))
    d = deviation(operand, centre, mask, spec.reduction)
    d, weighed_d = (
        split_groups(v, spec.layout) for v in (d, multiply_by_weights(d, mask))
    )
    s1, s2 = _total((_sum(weighed_d), summed_products(d, weighed_d)), x, spec.reduction)
    m2 = s2 - outer_products(s1, mean_from_sum(s1, count))
    return CoMoments(count, mean, m2)


@functools.partial(co_statistics.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    result = CoMoments._make(map(name_for_remat, co_statistics(*primals, spec)))
    where = gradient_mask(x, mask)
    operand, centre = _replicas.pvary_together(x, result.mean)
    d = deviation(operand, centre, where, spec.reduction)
    dx = _axes.split_like(x, jnp.zeros_like(x)) if is_zero(dx) else dx
    first = half = multiply_by_weights(zero_where_masked(dx, where), mask)
    counts = []
    if is_weighted(mask) and not is_zero(dw):
        first, half = first + d * dw, half + d * dw / 2
        counts.append(count_valid(x, dw, spec.reduction.axes))
    d, first, half = (split_groups(v, spec.layout) for v in (d, first, half))
    sums = _sum(first), summed_products(d, half), *counts
    s1, s2, *counts = _total(sums, x, spec.reduction)
    dn = jnp.zeros_like(result.count)
    if counts:  # the results for an empty batch are constants
        (dn,) = counts
        s1, s2 = (jnp.where(result.count > 0, s, 0) for s in (s1, s2))
    dmean = mean_from_sum(s1, result.count).ravel()
    dm2 = s2 + jnp.swapaxes(s2, -1, -2)
    return result, CoMoments(dn, dmean, dm2)


def _sum(x: jax.Array) -> jax.Array:
    """The sum over positions: (groups, size)."""
    return x.sum(tuple(range(x.ndim - 2)))


def _total(sums, x: jax.Array, reduction: ReductionSpec):
    """The sums over the replicas; together also where jit communicates them."""
    if reduction.axis_name is None and not _replicas.may_span_devices(x):
        return sums
    return _replicas.packed_sum(sums, reduction.axis_name, reduction.groups)
