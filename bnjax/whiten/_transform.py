"""W (x - mean) * scale + bias, of given statistics or of those of the batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _axes, _dtypes, _replicas
from bnjax.moments import valid
from bnjax.normalize import Affine, describe, per_feature
from bnjax.whiten import _layout
from bnjax.whiten._layout import Layout
from bnjax.whiten._roots import check_method, root
from bnjax.whiten._statistics import CoReduction, co_statistics


class Whitening(NamedTuple):
    """What is done to each group of features; static."""

    affine: Affine
    layout: Layout
    method: str
    iterations: int


def described(x, parameters, layout: Layout, options, method) -> Whitening:
    """The checked static description of the whitening of `x`."""
    affine = describe(x, parameters, axis=layout.axis, implementation=None, **options)
    if jnp.issubdtype(affine.compute, jnp.complexfloating):
        raise TypeError(
            f"the output would have dtype {affine.output}: expected a real one. Pass "
            "real parameters, and write dtype=None."
        )
    return Whitening(affine, layout, method[0], check_method(*method))


def statistics_of(x, how: Whitening, mean, covariance, scale, bias):
    """mean, covariance, scale and bias, checked; (0, I, 1, 0) where they are None."""
    layout, dtype = how.layout, how.affine.compute
    vectors = {"mean": mean, "var": None, "scale": scale, "bias": bias}
    mean, _, scale, bias = per_feature(x, layout.axis, how.affine, **vectors)
    if covariance is None:
        eye = jnp.eye(layout.size, dtype=dtype)
        covariance = jnp.broadcast_to(eye, (layout.groups, *eye.shape))
    covariance = _layout.covariances("covariance", covariance, layout, dtype)
    return mean, covariance, scale, bias


# Compiled apart from the activation, which may close over anything.


@functools.partial(jax.jit, static_argnums=3)
def by_given(x, given, epsilon, how: Whitening):
    """(x - mean) M + b, as (x - c) M + (b - (mean - c) M) for a constant c = mean.

    The value is the same, and so is every derivative; but that by the mean is taken
    of a vector, and not of an array as large as `x`.
    """
    mean, covariance, scale, bias = given
    groups = how.layout.groups, how.layout.size
    matrices = root(covariance, epsilon, how.method, how.iterations)
    matrices = scale.reshape(*groups, 1) * matrices
    centre = lax.stop_gradient(mean)
    moved = _layout.whitened(matrices, mean - centre, Layout(0, *groups)).reshape(
        groups
    )
    centre, matrices, offset = _cast(x, centre, matrices, bias.reshape(groups) - moved)
    x = x.astype(how.affine.compute)
    centre, offset = (
        _axes.expand(v.ravel(), (how.layout.axis,), x.ndim) for v in (centre, offset)
    )
    return _layout.whitened(matrices, x - centre, how.layout) + offset


def _cast(x: jax.Array, *values: jax.Array):
    """The values, cast together to vary over the replicas as `x`: one collective."""
    if not _replicas.varying(x):
        return values
    vector, unpack = _replicas.pack(values)
    return unpack(_replicas.cast_like(x, vector))


@functools.partial(jax.jit, static_argnums=(4, 5))
def by_batch(x, given, epsilon, mask, over: CoReduction, how: Whitening):
    """The whitened `x` and its co-moments; `given` is for an empty batch."""
    if mask is not None:
        x = valid(x, mask | jnp.isfinite(x))
    x = x.astype(_dtypes.statistics(x.dtype))
    batch = co_statistics(x, mask, over)
    mean = batch.mean.astype(how.affine.compute)
    covariance = batch.covariance().astype(how.affine.compute)
    if mask is not None or 0 in (x.shape[a] for a in over.over.axes):  # may be empty
        seen = batch.count > 0
        mean = _axes.where(seen, mean, given[0])
        covariance = _axes.where(seen, covariance, given[1])
    return by_given(x, (mean, covariance, *given[2:]), epsilon, how), batch
