"""The moments over all replicas, and their derivative."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax import _axes, _checks, _replicas
from bnjax.moments._merge import merge_replicas
from bnjax.moments._one_pass import Reduction, centred, reread, valid
from bnjax.moments._parts import of_parts
from bnjax.moments._value import Moments, mean_of

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


# The derivative. With c = x - mean, over the valid values of every replica:
#     dmean = sum dx / n,     dm2 = 2 sum Re(conj(c) dx)
# because the term through dmean vanishes: sum c = 0. One stacked sum, so the transpose
# holds one collective, and the shift and the merge are never differentiated.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def statistics(x: jax.Array, mask: jax.Array | None, how: Reduction) -> Moments:
    """The moments of a widened `x`, differentiable; arguments are checked already."""
    local, rest = of_parts(x, mask, how)
    if how.axis_name is None:
        return local
    return merge_replicas(local, rest, how.axis_name, how.groups)


@statistics.defjvp
def _(how, primals, tangents):
    (x, mask), (dx, _) = primals, tangents
    # Named here, and not inside `statistics`: a policy does not look into its call.
    result = Moments._make(map(named, statistics(x, mask, how)))
    deviation = valid(centred(*reread(x, result.mean, how), how), mask)
    dx = valid(dx, mask)
    sums = dx.sum(how.axes), (jnp.conj(deviation) * dx).sum(how.axes)
    if how.axis_name is not None or _replicas.several(x):
        sums = _replicas.all_sum(jnp.stack(sums), how.axis_name, how.groups)
    dmean = mean_of(sums[0], result.count)
    return result, Moments(jnp.zeros_like(result.count), dmean, 2 * sums[1].real)


def named(value: jax.Array) -> jax.Array:
    """`value`, under the name that the checkpoint policy keeps."""
    if jnp.iscomplexobj(value):  # jax.checkpoint keeps no complex value
        return lax.complex(named(value.real), named(value.imag))
    return checkpoint_name(value, NAME)
