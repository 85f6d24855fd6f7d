"""Merges of Moments that are differentiable, or shared between replicas."""

import functools

import jax
import jax.numpy as jnp

from bnjax import _axes, _replicas
from bnjax.moments._batch import (
    ReductionSpec,
    batch_moments,
    common_shift,
    is_zero,
    moments_from_sums,
    moments_tangent,
    moments_with_retry,
    name_for_remat,
    tangent_sums,
)
from bnjax.moments._moments import (
    Moments,
    abs_product,
    broadcast_count,
    drop_last_bit,
    mean_from_sum,
)


def merge_rows(
    rows: Moments,
    axis_name: _replicas.AxisName | None = None,
    groups: _replicas.Groups | None = None,
    *,
    mean_errors: jax.Array | None = None,
    shift: jax.Array | None = None,
) -> Moments:
    """Merges rows of Moments, and the rows of every replica.

    Args:
        rows: Moments of sets of values, (rows, *feature); the count (rows,) or
            (rows, *feature).
        axis_name: of the replicas to merge over, or None.
        groups: a partition of that axis, or None.
        mean_errors: the rounding error of each mean, (rows, *feature), if known.
        shift: (*feature,), a guess of the merged mean, the same on all replicas; None
            for 0.
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
        return moments_from_sums(count, centre, *sums(centre))[0]
    shift = common_shift(shift, axis_name, zero)
    return moments_with_retry(
        sums, count, (shift, *sums(shift)), axis_name, groups, "xla"
    )[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def merge_rows_with_rule(
    rows: Moments,
    mean_errors: jax.Array,
    shift: jax.Array | None,
    axis_name: _replicas.AxisName | None = None,
    groups: _replicas.Groups | None = None,
) -> Moments:
    """The merge of rows of moments, differentiable, and of those of every replica."""
    return merge_rows(rows, axis_name, groups, mean_errors=mean_errors, shift=shift)


@functools.partial(merge_rows_with_rule.defjvp, symbolic_zeros=True)
def _(axis_name, groups, primals, tangents):
    (rows, mean_errors, _), (change, _, _) = primals, tangents
    result = merge_rows_with_rule(*primals, axis_name, groups)
    counted = not is_zero(change.count)
    dn, dmean, dm2 = (
        jnp.zeros_like(row) if is_zero(t) else t for row, t in zip(rows, change)
    )
    c = rows.mean - result.mean[None] + mean_errors
    first = half = broadcast_count(rows.count, dmean) * dmean
    if counted:  # a row without values has no c
        c = _axes.where(broadcast_count(rows.count, dm2) > 0, c, jnp.zeros((), c.dtype))
        first = first + broadcast_count(dn, c) * c
        half = half + broadcast_count(dn, c) * c / 2
    sums = [first.sum(0), (dm2 + 2 * (jnp.conj(c) * half).real).sum(0)]
    sums += [dn.sum(0)] if counted else []
    if axis_name is not None:
        sums = _replicas.packed_sum(sums, axis_name, groups)
    dn = sums[2] if counted else jnp.zeros_like(result.count)
    return result, Moments(dn, mean_from_sum(sums[0], result.count), sums[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def moments_of_group_and_pool(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    spec: ReductionSpec,
    outer_groups: _replicas.Groups | None,
) -> tuple[Moments, Moments]:
    """The moments over a group of replicas, and over the pool of groups that it is in.

    One collective for both, of each replica's Moments; one more in the derivative by
    the pool's.

    Args:
        x: widened.
        mask: of the rank of `x`, or None.
        shift: see `moments`.
        spec: with the name of an axis, and groups of its replicas, or None for one.
        pools: a partition of the axis that does not part a group; None for one of all.
    """
    name = spec.axis_name
    assert name is not None
    local, mean_error = batch_moments(
        x, mask, shift, spec._replace(axis_name=None, groups=None)
    )
    each = _replicas.packed_rows((*local, mean_error), name)

    def merged(groups):
        of_own_group = (
            _replicas.zero_other_groups(value, name, groups) for value in each
        )
        *rows, mean_errors = of_own_group
        return merge_rows(Moments(*rows), mean_errors=mean_errors)

    return merged(spec.groups), merged(outer_groups)


@functools.partial(moments_of_group_and_pool.defjvp, symbolic_zeros=True)
def _(spec, outer_groups, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    group, pool = jax.tree.map(
        name_for_remat, moments_of_group_and_pool(*primals, spec, outer_groups)
    )
    first, second, dn = tangent_sums(x, mask, group.mean, dx, dw, spec)
    apart = group.mean - pool.mean
    about_pool = [first, second + jnp.conj(apart) * first, dn]
    if dn is not None:
        weight = broadcast_count(dn, apart)
        about_pool[0] = first + apart * weight
        about_pool[1] = about_pool[1] + jnp.conj(apart) * apart * weight / 2
    return (group, pool), (
        moments_tangent(group, (first, second, dn), spec.axis_name, spec.groups, True),
        moments_tangent(pool, about_pool, spec.axis_name, outer_groups, True),
    )
