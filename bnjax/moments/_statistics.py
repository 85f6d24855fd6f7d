"""The moments over all replicas, and their derivative."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import _axes, _backend, _checks, _replicas
from bnjax.moments._reduction import Reduction, count_valid, deviation, valid
from bnjax.moments._shifted import batch_moments, merged_rows
from bnjax.moments._value import Moments, abs_product, beside, mean_of

# What a checkpoint policy keeps: see normalize.
NAME = "bnjax_moments"


def reduction(x, axis, axis_name=None, groups=None, implementation=None) -> Reduction:
    """The static description of a reduction of `x`; checks all but `implementation`."""
    feature_axes = _axes.canonical(axis, x.ndim)
    axis_name = _checks.axis_name(axis_name)
    size = 1 if axis_name is None else _replicas.axis_size(axis_name)
    groups = _checks.groups(groups, axis_name, size)
    axes = _axes.complement(feature_axes, x.ndim)
    return Reduction(axes, x.dtype, axis_name, groups, implementation)


def statistics(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, how: Reduction
) -> Moments:
    """The moments of a widened `x`, differentiable; arguments are checked already."""
    return exact_statistics(x, mask, shift, how)[0]


def exact_statistics(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, how: Reduction
) -> tuple[Moments, jax.Array]:
    """`statistics`, and what the rounded mean lacks: a merge to come needs it."""
    if how.implementation == _backend.PLAIN:
        batch = _two_pass(x, mask, how)
        return batch, jnp.zeros_like(batch.mean)
    return _exact_statistics(x, mask, shift, how)


def _two_pass(x: jax.Array, mask: jax.Array | None, how: Reduction) -> Moments:
    """By the definition, for JAX to differentiate: the mean, then what is about it."""
    sums = count_valid(x, mask, how.axes), valid(x, mask).sum(how.axes)
    if how.axis_name is not None:
        sums = _replicas.packed_sum(sums, how.axis_name, how.groups)
    count, mean = sums[0], mean_of(sums[1], sums[0])
    d = deviation(x, mask, mean, how)
    m2 = abs_product(d, d).sum(how.axes)
    return Moments(count, mean, _replicas.all_sum(m2, how.axis_name, how.groups))


# The derivative. With c = x - mean, over the valid values of every replica:
#     dmean = sum dx / n,     dm2 = 2 sum Re(conj(c) dx)
# because the term through dmean vanishes: sum c = 0. One stacked sum, so the transpose
# holds one collective, and neither the shift nor the guard is differentiated.


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _exact_statistics(
    x: jax.Array, mask: jax.Array | None, shift: jax.Array | None, how: Reduction
) -> tuple[Moments, jax.Array]:
    return _traced_once(x, mask, shift, how)


# Traced for the value and for the derivative, which would take a fifth of the time that
# a layer needs to be traced.
_traced_once = jax.jit(batch_moments, static_argnums=3, inline=True)


@_exact_statistics.defjvp
def _(how, primals, tangents):
    (x, mask, _), (dx, _, _) = primals, tangents
    # Named here, and not inside the call: a policy does not look into it.
    result, rest = jax.tree.map(named, _exact_statistics(*primals, how))
    d, dx = deviation(x, mask, result.mean, how), valid(dx, mask)
    sums = dx.sum(how.axes), (jnp.conj(d) * dx).sum(how.axes)
    if how.axis_name is not None or _replicas.several(x):
        sums = _replicas.all_sum(jnp.stack(sums), how.axis_name, how.groups)
    dmean = mean_of(sums[0], result.count)
    change = Moments(jnp.zeros_like(result.count), dmean, 2 * sums[1].real)
    return (result, rest), (change, jnp.zeros_like(rest))


# The derivative of a merge, over the rows of every replica:
#     dmean = sum n_i dmean_i / n
#     dm2 = sum dm2_i + 2 n_i Re(conj(mean_i - mean) dmean_i)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def merged_statistics(
    rows: Moments,
    rests: jax.Array,
    shift: jax.Array | None,
    axis_name: _replicas.AxisName | None = None,
    groups: _replicas.Groups | None = None,
) -> Moments:
    """The merge of rows of moments, differentiable, and of those of every replica."""
    return merged_rows(rows, axis_name, groups, rests=rests, shift=shift)


@merged_statistics.defjvp
def _(axis_name, groups, primals, tangents):
    (rows, rests, _), (change, _, _) = primals, tangents
    result = merged_statistics(*primals, axis_name, groups)
    weighted = beside(rows.count, change.mean) * change.mean
    deviation = jnp.conj(rows.mean - result.mean[None] + rests)
    sums = weighted.sum(0), (change.m2 + 2 * (deviation * weighted).real).sum(0)
    if axis_name is not None:
        sums = _replicas.packed_sum(sums, axis_name, groups)
    dmean = mean_of(sums[0], result.count)
    return result, Moments(jnp.zeros_like(result.count), dmean, sums[1])


# The derivative of the Moments of a group of replicas and of those of a larger pool: as
# above, where the sums about the pool's mean come from those about the group's,
#     sum conj(x - mean) dx = sum conj(x - mean_g) dx + conj(mean_g - mean) sum dx


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def nested_statistics(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array | None,
    how: Reduction,
    pools: _replicas.Groups | None,
) -> tuple[Moments, Moments]:
    """The moments over a group of replicas, and over the pool of groups that it is in.

    One collective for both, of each replica's Moments; one more in the derivative by
    the pool's.

    Args:
        x: widened.
        mask: of the rank of `x`, or None.
        shift: see `_shifted`.
        how: with the name of an axis, and groups of its replicas, or None for one.
        pools: a partition of the axis that does not part a group; None for one of all.
    """
    name = how.axis_name
    assert name is not None
    local, rest = batch_moments(
        x, mask, shift, how._replace(axis_name=None, groups=None)
    )
    each = _replicas.packed_rows((*local, rest), name)

    def merged(groups):
        own = (_replicas.of_own_group(value, name, groups) for value in each)
        *rows, rests = own
        return merged_rows(Moments(*rows), rests=rests)

    return merged(how.groups), merged(pools)


@nested_statistics.defjvp
def _(how, pools, primals, tangents):
    (x, mask, _), (dx, _, _) = primals, tangents
    group, pool = jax.tree.map(named, nested_statistics(*primals, how, pools))
    d, dx = deviation(x, mask, group.mean, how), valid(dx, mask)
    first, second = dx.sum(how.axes), (jnp.conj(d) * dx).sum(how.axes)
    moved = second + jnp.conj(group.mean - pool.mean) * first

    def change(result, sums, groups):
        sums = _replicas.all_sum(jnp.stack(sums), how.axis_name, groups)
        dmean = mean_of(sums[0], result.count)
        return Moments(jnp.zeros_like(result.count), dmean, 2 * sums[1].real)

    changes = (
        change(group, (first, second), how.groups),
        change(pool, (first, moved), pools),
    )
    return (group, pool), changes


def named(value: jax.Array) -> jax.Array:
    """`value`, under the name that the checkpoint policy keeps."""
    if jnp.iscomplexobj(value):  # jax.checkpoint keeps no complex value
        return lax.complex(named(value.real), named(value.imag))
    return checkpoint_name(value, NAME)
