"""Axis arithmetic. The only place where negative axes are resolved."""

import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Axes = tuple[int, ...]


def canonical(axis: int | Sequence[int], ndim: int) -> Axes:
    """The axes as sorted non-negative integers; raises on an axis that is not there."""
    named = tuple(map(operator.index, axis if isinstance(axis, Iterable) else (axis,)))
    if ndim == 0:
        raise ValueError(
            f"the input has shape (), which has no axis={axis!r}: expected at least a "
            "feature axis, for example (batch, feature). Write x[None, None]."
        )
    wrong = [a for a in named if not -ndim <= a < ndim]
    if wrong:
        raise ValueError(
            f"axis={axis!r} is out of range for an input of {ndim} dimension(s): "
            f"expected integers from {-ndim} to {ndim - 1}, got {wrong[0]}. "
            "axis names the feature axis, for example axis=-1 for "
            "(batch, height, width, feature)."
        )
    axes = tuple(sorted(a % ndim for a in named))
    if len(set(axes)) != len(axes):
        raise ValueError(
            f"axis={axis!r} names an axis of the {ndim}-dimensional input twice: "
            "expected distinct axes. Name each feature axis once."
        )
    return axes


def complement(axes: Axes, ndim: int) -> Axes:
    """Every axis that is not in `axes`, in ascending order."""
    return tuple(a for a in range(ndim) if a not in axes)


def sizes(shape: Sequence[int], axes: Axes) -> tuple[int, ...]:
    """The sizes of `axes` in ascending order: the shape of a per-feature value."""
    return tuple(shape[a] for a in axes)


def expand(value: jax.Array, axes: Axes, ndim: int) -> jax.Array:
    """A per-feature value of shape `sizes(shape, axes)` that broadcasts against x.

    A scalar stays a scalar: it already does.
    """
    if value.ndim == 0:
        return value
    of_axis = dict(zip(axes, value.shape, strict=True))
    return value.reshape([of_axis.get(a, 1) for a in range(ndim)])


def where(condition: jax.Array, value: jax.Array, other: jax.Array) -> jax.Array:
    """`jnp.where` for a `value` of the full shape, split over devices as `value` is.

    With Explicit mesh axes a select takes only arguments of one sharding.
    """
    return jnp.where(split_like(value, condition), value, split_like(value, other))


def split_like(reference: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, split over Explicit mesh axes as `reference`; axes of size 1 stay whole.

    `x` has the axes of `reference`, or its leading ones, each of its size or 1.
    """
    sharding = jax.typeof(reference).sharding
    if not any(sharding.spec) or x.ndim == 0:
        return x
    spec = [s if n > 1 else None for s, n in zip(sharding.spec, x.shape)]
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
