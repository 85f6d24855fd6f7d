"""Which values count, and how much: one array, the mask.

It is boolean; or real, and then its values are weights w >= 0, of which 0 is False and
1 is True:

    n = sum w,   sum w d,   sum w |d|^2
"""

import math

import jax
import jax.numpy as jnp

from bnjax import _axes, _dtypes

# Masked values larger than this are replaced by 0.
_MAX_MASKED_VALUE = 1e9


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


def count_valid(
    x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array:
    """The sum of the weights: (), or (feature,) where the mask varies by feature.

    Linear in the mask, so that it also sums the tangent of weights.
    """
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


def valid_or_bounded(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns where `x` is valid, or |x| is at most 1e9.

    Derivatives multiply powers of a masked x and of rstd by a cotangent of 0. If the
    powers overflowed, the product would be NaN.
    """
    limit = min(_MAX_MASKED_VALUE, float(jnp.finfo(x.dtype).max))
    return mask.astype(bool) | (jnp.abs(x) <= limit)


def gradient_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns where the derivative by `x` or by its weight may be nonzero.

    This includes weights of 0: the derivative by the weight does not vanish there.
    """
    return valid_or_bounded(x, mask) if mask is not None and is_weighted(mask) else mask
