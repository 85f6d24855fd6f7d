"""What a reduction is over, and the sums of one array that it takes.

Which values count is said by one array, the mask. It is boolean; or real, and then its
values are weights w >= 0, of which 0 is False and 1 is True:

    n = sum w,   sum w d,   sum w |d|^2
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _axes, _backend, _dtypes, _replicas
from bnjax.moments._value import abs_product

# Beyond it, what does not count is read as 0.
_GARBAGE = 1e9


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
    reduction_spec: ReductionSpec,
) -> tuple[jax.Array, jax.Array]:
    """sum w d and sum w |d|^2 over the valid values, d = x - centre; None for 0."""
    first = _fresh(x, centre, reduction_spec)
    again = _fresh(*first, reduction_spec)
    values = multiply_by_weights(_deviation(*first, mask, reduction_spec), mask)
    d = _deviation(*again, mask, reduction_spec)
    squares = abs_product(d, multiply_by_weights(d, mask))
    several_axes = x.ndim - len(reduction_spec.axes) > 1
    if reduction_spec.implementation == "subsample" and several_axes:
        return _sums_together(values, squares, reduction_spec.axes)
    return values.sum(reduction_spec.axes), squares.sum(reduction_spec.axes)


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
    x: jax.Array, mask: jax.Array | None, mean: jax.Array, reduction_spec: ReductionSpec
) -> tuple[jax.Array, jax.Array | None]:
    """x - mean, and 0 where it has no derivative; and where: one more read of `x`."""
    x, centre = _fresh(x, mean, reduction_spec)
    where = gradient_mask(x, mask)
    return _deviation(x, centre, where, reduction_spec), where


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
    reduction_spec: ReductionSpec,
) -> jax.Array:
    """x - centre, and 0 where the mask is False.

    There the centre is put for `x` before the subtraction: of 0 put behind it XLA:GPU
    may write an array as large as x, before it sums.
    """
    if centre is None:
        return zero_where_masked(x, mask)
    centre = _axes.expand(centre, _axes.complement(reduction_spec.axes, x.ndim), x.ndim)
    return (x if mask is None else _axes.where(mask.astype(bool), x, centre)) - centre


def _fresh(x: jax.Array, centre: jax.Array | None, reduction_spec: ReductionSpec):
    """Both, for one more sum: see `_backend.reread`."""
    vectors = [] if centre is None else [centre]
    values = _replicas.cast_together(x, *vectors)
    x, *vectors = _backend.reread(
        reduction_spec.storage, reduction_spec.implementation, *values
    )
    return x, vectors[0] if vectors else None
