"""The moments over all replicas, and their derivative."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import _axes, _backend, _checks, _replicas
from bnjax.moments._batch import (
    ReductionSpec,
    batch_moments,
    count_valid,
    deviation_for_gradient,
    is_weighted,
    merged_rows,
    multiply_by_weights,
    zero_where_masked,
)
from bnjax.moments._moments import Moments, abs_product, broadcast_count, mean_from_sum

# The name under which a checkpoint policy saves the moments; see `normalize`.
CHECKPOINT_NAME = "bnjax_moments"


def reduction_spec(
    x, axis, axis_name=None, groups=None, implementation=None
) -> ReductionSpec:
    """The static description of a reduction of `x`; checks all but `implementation`."""
    feature_axes = _axes.canonical(axis, x.ndim)
    axis_name = _checks.axis_name(axis_name)
    size = 1 if axis_name is None else _replicas.axis_size(axis_name)
    groups = _checks.groups(groups, axis_name, size)
    axes = _axes.complement(feature_axes, x.ndim)
    return ReductionSpec(axes, x.dtype, axis_name, groups, implementation)


def compute_moments(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: ReductionSpec
) -> Moments:
    """Returns the Moments of `x` over all replicas. Differentiable.

    `x` must be at least float32. The mask may hold weights; see `mask_with_weights`.
    """
    return moments_with_mean_error(x, mask, shift, spec)[0]


def moments_with_mean_error(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: ReductionSpec
) -> tuple[Moments, jax.Array]:
    """As `compute_moments`, with the rounding error of the mean, for a merge."""
    if spec.implementation == _backend.PLAIN:
        batch = _two_pass(x, mask, spec)
        return batch, jnp.zeros_like(batch.mean)
    return _moments_with_mean_error(x, mask, shift, spec)


def _two_pass(x: jax.Array, mask: jax.Array | None, spec: ReductionSpec) -> Moments:
    """The two passes of the definition, without derivative rules of their own."""
    total = multiply_by_weights(zero_where_masked(x, mask), mask).sum(spec.axes)
    sums = count_valid(x, mask, spec.axes), total
    if spec.axis_name is not None:
        sums = _replicas.packed_sum(sums, spec.axis_name, spec.groups)
    count, mean = sums[0], mean_from_sum(sums[1], sums[0])
    d, _ = deviation_for_gradient(x, mask, mean, spec)
    m2 = abs_product(d, multiply_by_weights(d, mask)).sum(spec.axes)
    return Moments(count, mean, _replicas.all_sum(m2, spec.axis_name, spec.groups))


# The derivative. With c = x - mean, over the valid values of every replica:
#     dmean = sum w dx / n,     dm2 = 2 sum w Re(conj(c) dx)
# because the term through dmean vanishes: sum w c = 0. One stacked sum, so that the
# transpose holds one collective, and neither the shift nor the guard is differentiated.
# Weights that vary add, also where w = 0,
#     dn = sum dw,     dmean = sum dw c / n,     dm2 = sum dw |c|^2


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _moments_with_mean_error(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, spec: ReductionSpec
) -> tuple[Moments, jax.Array]:
    return _traced_once(x, mask, shift, spec)


# jit keeps the trace, so that value and derivative share it. A second trace would cost
# a fifth of the time that a layer needs to be traced.
_traced_once = jax.jit(batch_moments, static_argnums=3, inline=True)


@functools.partial(_moments_with_mean_error.defjvp, symbolic_zeros=True)
def _(spec, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    # Named here: a checkpoint policy does not see names inside a jitted call.
    result, rest = jax.tree.map(
        name_for_remat, _moments_with_mean_error(*primals, spec)
    )
    sums = _tangent_sums(x, mask, result.mean, dx, dw, spec)
    several = spec.axis_name is not None or _replicas.may_span_devices(x)
    change = _moments_tangent(result, sums, spec.axis_name, spec.groups, several)
    return (result, rest), (change, jnp.zeros_like(rest))


def _tangent_sums(x, mask, mean, dx, dw, spec: ReductionSpec):
    """Returns this replica's sums for the tangent, with c = x - mean.

    (sum w dx + dw c, sum conj(c) (w dx + dw c / 2), sum dw). The 1/2 cancels the factor
    2 in dm2. The third is None if the weights have no tangent.
    """
    c, where = deviation_for_gradient(x, mask, mean, spec)
    dx = _axes.split_like(x, jnp.zeros_like(x)) if is_zero(dx) else dx
    first = multiply_by_weights(zero_where_masked(dx, where), mask)
    second = jnp.conj(c) * first
    dn = None
    if is_weighted(mask) and not is_zero(dw):
        by_weight = c * dw.astype(c.dtype)
        first, second = first + by_weight, second + jnp.conj(c) * by_weight / 2
        dn = count_valid(x, dw, spec.axes)
    return first.sum(spec.axes), second.sum(spec.axes), dn


def _moments_tangent(
    result: Moments, sums, axis_name, groups, several: bool
) -> Moments:
    """Returns the tangent of the Moments, summed over replicas in one collective."""
    *sums, dn = sums
    if dn is not None and axis_name is not None:
        *sums, dn = _replicas.packed_sum((*sums, dn), axis_name, groups)
    elif several:
        sums = _replicas.all_sum(jnp.stack(sums), axis_name, groups)
    dmean, dm2 = mean_from_sum(sums[0], result.count), 2 * sums[1].real
    if dn is None:
        return Moments(jnp.zeros_like(result.count), dmean, dm2)
    # Nothing varies about the values given for those of an empty batch.
    seen = broadcast_count(result.count, result.m2) > 0
    dmean, dm2 = (_axes.where(seen, v, jnp.zeros((), v.dtype)) for v in (dmean, dm2))
    return Moments(dn, dmean, dm2)


def is_zero(tangent) -> bool:
    """Returns whether a tangent is a symbolic zero."""
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


# The derivative of a merge, with c_i = mean_i - mean, over the rows of every replica:
#     dmean = sum n_i dmean_i / n
#     dm2 = sum dm2_i + 2 n_i Re(conj(c_i) dmean_i)
# Counts that vary, which are sums of weights, add
#     dn = sum dn_i,     dmean = sum dn_i c_i / n,     dm2 = sum dn_i |c_i|^2


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def merged_statistics(
    rows: Moments,
    mean_errors: jax.Array,
    shift: jax.Array | None,
    axis_name: _replicas.AxisName | None = None,
    groups: _replicas.Groups | None = None,
) -> Moments:
    """The merge of rows of moments, differentiable, and of those of every replica."""
    return merged_rows(rows, axis_name, groups, mean_errors=mean_errors, shift=shift)


@functools.partial(merged_statistics.defjvp, symbolic_zeros=True)
def _(axis_name, groups, primals, tangents):
    (rows, mean_errors, _), (change, _, _) = primals, tangents
    result = merged_statistics(*primals, axis_name, groups)
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


# The derivative of the Moments of a group of replicas and of those of a larger pool: as
# above, where the sums about the pool's mean come from those about the group's,
#     sum conj(x - mean) dx = sum conj(x - mean_g) dx + conj(mean_g - mean) sum dx
# and, for weights that vary, with a = mean_g - mean,
#     sum dw (x - mean) = sum dw (x - mean_g) + a sum dw


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def nested_statistics(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    spec: ReductionSpec,
    pools: _replicas.Groups | None,
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
    local, rest = batch_moments(
        x, mask, shift, spec._replace(axis_name=None, groups=None)
    )
    each = _replicas.packed_rows((*local, rest), name)

    def merged(groups):
        own = (_replicas.of_own_group(value, name, groups) for value in each)
        *rows, mean_errors = own
        return merged_rows(Moments(*rows), mean_errors=mean_errors)

    return merged(spec.groups), merged(pools)


@functools.partial(nested_statistics.defjvp, symbolic_zeros=True)
def _(spec, pools, primals, tangents):
    (x, mask, _), (dx, dw, _) = primals, tangents
    group, pool = jax.tree.map(name_for_remat, nested_statistics(*primals, spec, pools))
    first, second, dn = _tangent_sums(x, mask, group.mean, dx, dw, spec)
    apart = group.mean - pool.mean
    about_pool = [first, second + jnp.conj(apart) * first, dn]
    if dn is not None:
        weight = broadcast_count(dn, apart)
        about_pool[0] = first + apart * weight
        about_pool[1] = about_pool[1] + jnp.conj(apart) * apart * weight / 2
    return (group, pool), (
        _moments_tangent(group, (first, second, dn), spec.axis_name, spec.groups, True),
        _moments_tangent(pool, about_pool, spec.axis_name, pools, True),
    )


def name_for_remat(value: jax.Array) -> jax.Array:
    """Returns `value`, under the name that the checkpoint policy saves."""
    if jnp.iscomplexobj(value):  # jax.checkpoint keeps no complex value
        return lax.complex(name_for_remat(value.real), name_for_remat(value.imag))
    return checkpoint_name(value, CHECKPOINT_NAME)
