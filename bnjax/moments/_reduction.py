"""What a reduction is over, and the sums of one array that it takes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bnjax import _axes, _backend, _dtypes, _replicas
from bnjax.moments._value import abs_product


class Reduction(NamedTuple):
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
    x: jax.Array, mask: jax.Array | None, centre: jax.Array | None, reduction: Reduction
) -> tuple[jax.Array, jax.Array]:
    """sum d and sum |d|^2 over the valid values, where d = x - centre; None for 0."""
    first = _fresh(x, centre, reduction)
    again = _fresh(*first, reduction)
    s1 = valid(_minus(*first, reduction), mask).sum(reduction.axes)
    d = valid(_minus(*again, reduction), mask)
    return s1, abs_product(d, d).sum(reduction.axes)


def deviation(
    x: jax.Array, mask: jax.Array | None, mean: jax.Array, reduction: Reduction
) -> jax.Array:
    """x - mean, and 0 where the mask is False; one more read of `x`."""
    return valid(_minus(*_fresh(x, mean, reduction), reduction), mask)


def count_valid(
    x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array:
    """The number of valid values; (feature,) where the mask varies by feature."""
    dtype = _dtypes.real(x.dtype)
    if mask is None:
        return jnp.full((), math.prod(x.shape[a] for a in axes), dtype)
    repeats = math.prod(x.shape[a] for a in axes if mask.shape[a] == 1)
    flags = math.prod(mask.shape[a] for a in axes)
    # Where jit splits the batch, sums of one dtype are sent together.
    exact = isinstance(flags, int) and flags <= 1 / jnp.finfo(dtype).eps
    counts = mask.sum(axes, dtype=dtype if exact else jnp.int32).astype(dtype)
    counts = counts * jnp.asarray(repeats, dtype)
    if counts.size == 1:
        return counts.reshape(())
    return jnp.broadcast_to(
        counts, _axes.sizes(x.shape, _axes.complement(axes, x.ndim))
    )


def valid(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` with 0 where the mask is False."""
    return x if mask is None else _axes.where(mask, x, jnp.zeros((), x.dtype))


def _minus(x: jax.Array, centre: jax.Array | None, reduction: Reduction) -> jax.Array:
    if centre is None:
        return x
    return x - _axes.expand(centre, _axes.complement(reduction.axes, x.ndim), x.ndim)


def _fresh(x: jax.Array, centre: jax.Array | None, reduction: Reduction):
    """Both, for one more sum: see `_backend.reread`."""
    vectors = [] if centre is None else [centre]
    values = _replicas.cast_together(x, *vectors)
    x, *vectors = _backend.reread(reduction.storage, reduction.implementation, *values)
    return x, vectors[0] if vectors else None
