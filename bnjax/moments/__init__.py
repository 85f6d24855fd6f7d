"""Moments of a set of numbers per feature, and their merge.

    merge: n = n_a + n_b,  mean = mean_a + d n_b/n,  m2 = m2_a + m2_b + |d|^2 n_a n_b/n
    with d = mean_b - mean_a;  the identity is count 0

The merge is associative and commutative (Chan, Golub & LeVeque 1979, "Updating formulae
and a pairwise algorithm for computing sample variances"), so the moments of a batch
do not depend on how it is split over micro-batches, masks or devices.
"""

import functools
from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from bnjax import _axes, _backend, _checks, _dtypes
from bnjax.moments._batch import (
    CHECKPOINT_NAME,
    ReductionSpec,
    compute_moments,
    deviation,
    is_zero,
    name_for_remat,
    reduction_spec,
)
from bnjax.moments._masks import (
    count_valid,
    gradient_mask,
    is_weighted,
    mask_with_weights,
    multiply_by_weights,
    valid_or_bounded,
    zero_where_masked,
)
from bnjax.moments._merge import (
    merge_rows,
    merge_rows_with_rule,
    moments_of_group_and_pool,
)
from bnjax.moments._moments import (
    Moments,
    Union,
    as_count,
    broadcast_count,
    drop_last_bit,
    mean_from_sum,
    merge,
    variance_from_m2,
)

__all__ = [
    "CHECKPOINT_NAME",
    "Moments",
    "ReductionSpec",
    "Union",
    "as_count",
    "broadcast_count",
    "compute_moments",
    "count_valid",
    "deviation",
    "drop_last_bit",
    "gradient_mask",
    "is_weighted",
    "is_zero",
    "mask_with_weights",
    "mean_from_sum",
    "merge",
    "merge_rows",
    "merge_rows_with_rule",
    "moments",
    "moments_of_group_and_pool",
    "multiply_by_weights",
    "name_for_remat",
    "reduction_spec",
    "valid_or_bounded",
    "variance_from_m2",
    "zero_where_masked",
]


def moments(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    shift: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Moments:
    """The moments of `x` per feature, exact over every replica of `axis_name`.

        count = sum w,  mean = sum w x / count,  m2 = sum w |x - mean|^2
        w = 1 for each value, or its weight; 0 where the mask is False

    One read of `x`, and one or two more where a mean lies further than 3 standard
    deviations from the shift. On one GPU there are never more: `x` is read once, and a
    small part of it.
    The relative error of the variance stays below 1e-5 in float32 at |mean|/std = 1e4,
    whatever the shift.

    Args:
        x: (batch, *spatial, feature), floating or complex.
        axis: the feature axis or axes; all others are reduced.
        mask: boolean, broadcastable to `x`; True = counts. What lies under False,
            NaN included, changes nothing.
        axis_name: the axis, or axes, of shard_map, pmap or vmap to merge over. Not
            needed under jit: the moments of a sharded batch are global there.
        axis_index_groups: a partition of that axis; replicas merge within their group.
            Groups may differ in size.
        shift: (feature,), a guess of the mean that does not depend on `x`, such as a
            running mean; None for 0. It saves reads, and does not change the result.
        weights: real floats >= 0, broadcastable to `x`: how often each value counts,
            1 for all of them by default. A weight of 2 counts the value twice; 0
            ignores it. If all weights are multiplied by the same number, the mean and
            the biased variance do not change; the count and the unbiased variance,
            which divides by sum w - 1, do. Differentiable. `mask` and `weights` can be
            combined.

    Returns:
        Moments of `promote_types(x.dtype, float32)`; feature axes in ascending order.

    Raises:
        TypeError: `x` or `weights` holds integers.
        ValueError: an axis out of range or repeated, a mask or weights that do not
            broadcast, weights known to be negative or not finite, an axis name that is
            repeated or not bound, groups that do not partition it.

    >>> count, mean, m2 = moments(jax.numpy.array([[1.0], [3.0], [8.0]]))
    >>> print(count, mean, m2)
    3.0 [4.] [26.]

    References: Chan, Golub & LeVeque 1979; Ioffe & Szegedy 2015, Algorithm 1.
    """
    x = _checks.require_inexact("x", x)
    mask, weights = _checks.mask(mask, x.shape), _checks.weights(weights, x.shape)
    mask = mask_with_weights(x, mask, weights)
    implementation = _backend.resolve_implementation(None, x)
    spec = reduction_spec(x, axis, axis_name, axis_index_groups, implementation)
    features = _axes.sizes(x.shape, _axes.complement(spec.axes, x.ndim))
    shift = _checks.shift(shift, features, axis, x.dtype)
    return _moments(x, mask, shift, spec)


@functools.partial(jax.jit, static_argnums=3)
def _moments(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: ReductionSpec
) -> Moments:
    return compute_moments(
        x.astype(_dtypes.statistics_dtype(x.dtype)), mask, shift, spec
    )[0]
