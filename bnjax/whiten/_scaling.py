"""The scaling of inputs by statistics that are fitted once, as (fit, apply, invert).

    standardize      (x - mean) / std
    min_max_scale    (x - min) / (max - min), to a range
    zca_whiten       covariance^(-1/2) (x - mean)

A constant feature is divided by 1, and so is one without a valid value. Scalers of one
kind and the same settings are equal, hashable and can be pickled.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes
from bnjax._bound import bind
from bnjax.moments import moments
from bnjax.whiten._co_moments import (
    HIGHEST,
    co_moments,
    layout_of,
    multiply_groups,
    require_real,
)
from bnjax.whiten._whiten import inverse_sqrt

Axis = int | Sequence[int]


class Scaler(NamedTuple):
    """A scaling of inputs; all pure.

    Attributes:
        fit: (x, mask=None) -> state. The mask is boolean and broadcastable to `x`.
            Values under False, NaN included, are ignored: `mask=~jnp.isnan(x)` leaves
            out missing values.
        apply: (state, x) -> y, of the shape of `x`, at least float32.
        invert: (state, y) -> x.

    >>> scaler = standardize()
    >>> state = scaler.fit(jnp.array([[1.0], [2.0], [3.0]]))
    >>> print(scaler.invert(state, scaler.apply(state, jnp.array([[7.0]]))))
    [[7.]]
    """

    fit: Callable[..., Any]
    apply: Callable[[Any, ArrayLike], jax.Array]
    invert: Callable[[Any, ArrayLike], jax.Array]


class Scaling(NamedTuple):
    """Of each feature: y = (x - offset) / scale + low."""

    offset: jax.Array
    scale: jax.Array
    low: jax.Array


class Colouring(NamedTuple):
    """The mean, the matrices that whiten each group, and their inverses."""

    mean: jax.Array
    whitening: jax.Array
    colouring: jax.Array


def standardize(*, axis: Axis = -1, ddof: int = 0) -> Scaler:
    """Mean 0 and variance 1 for each feature.

        y = (x - mean) / std

    Args:
        axis: the feature axis or axes; all others are reduced.
        ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
        Scaler. `fit` raises a TypeError for integers and a ValueError for an input
        without values; a NaN that is not masked makes its feature NaN.

    >>> scaler = standardize()
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0], [1.0, 5.0], [3.0, 5.0]])
    >>> print(scaler.apply(scaler.fit(x), x[:2]))
    [[-1.  0.]
     [ 1.  0.]]

    References: LeCun et al. 1998, "Efficient BackProp", section 4.3.
    """
    axis = _hashable(axis)
    return Scaler(bind(_fit_standard, axis=axis, ddof=ddof), *_affine(axis))


def _fit_standard(
    x: ArrayLike, mask: ArrayLike | None = None, *, axis: Axis, ddof: int
) -> Scaling:
    x = _not_empty(x, axis)
    _, mean, _ = batch = moments(x, axis=axis, mask=mask)
    std = jnp.sqrt(batch.variance(ddof))
    return Scaling(mean, _divisor(std, mean), jnp.zeros_like(mean))


def min_max_scale(*, axis: Axis = -1, low: float = 0.0, high: float = 1.0) -> Scaler:
    """From the range of each feature to [low, high].

        y = (x - min) / (max - min) * (high - low) + low

    Only the smallest and the largest value of each feature matter, so that one outlier
    changes the scale of all. Inputs that are scaled later may lie outside.

    Args:
        axis: the feature axis or axes; all others are reduced.
        low: the smallest value after scaling, and all values of a constant feature.
        high: the largest value after scaling.

    Returns:
        Scaler. `fit` raises as that of `standardize`.

    Raises:
        ValueError: low is not below high.

    >>> scaler = min_max_scale()
    >>> x = jnp.array([[4.0, 1.0], [8.0, 1.0], [5.0, 1.0]])
    >>> print(scaler.apply(scaler.fit(x), x))
    [[0.   0.  ]
     [1.   0.  ]
     [0.25 0.  ]]

    References: Han, Kamber & Pei 2011, "Data Mining", section 3.5.2.
    """
    if not low < high:
        raise ValueError(
            f"low={low!r} and high={high!r} are the range of the output: expected "
            "low < high. Write low=0.0, high=1.0."
        )
    axis = _hashable(axis)
    return Scaler(bind(_fit_range, axis=axis, low=low, high=high), *_affine(axis))


def _fit_range(
    x: ArrayLike, mask: ArrayLike | None = None, *, axis: Axis, low: float, high: float
) -> Scaling:
    x = _not_empty(x, axis)
    x = require_real("x", x).astype(_dtypes.statistics_dtype(x.dtype))
    axes = _axes.complement(_axes.canonical(axis, x.ndim), x.ndim)
    where = jnp.broadcast_to(_mask(mask, x), x.shape)
    smallest = jnp.min(x, axes, where=where, initial=jnp.inf)
    largest = jnp.max(x, axes, where=where, initial=-jnp.inf)
    any_valid = where.any(axes)
    smallest = jnp.where(any_valid, smallest, 0)
    extent = jnp.where(any_valid, largest - smallest, 0)
    scale = _divisor(extent, jnp.zeros_like(extent)) / (high - low)
    return Scaling(smallest, scale, jnp.full_like(smallest, low))


def zca_whiten(
    *, axis: int = -1, epsilon: float = 1e-5, group_size: int | None = None
) -> Scaler:
    """Mean 0 and covariance I, by the whitening that changes the input least.

        y = (covariance + epsilon I)^(-1/2) (x - mean)

    Args:
        axis: the feature axis; all others are reduced.
        epsilon: added to the variances, in the units of `x` squared. It damps
            directions of smaller variance, which would be amplified without it.
        group_size: the number of adjacent features in a group; None for one group.

    Returns:
        Scaler. `fit` raises as that of `standardize`, and a ValueError for a mask that
        varies by feature.

    Raises:
        ValueError: a negative epsilon.

    >>> scaler = zca_whiten(epsilon=0.0)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 8.0], [5.0, 2.0], [3.0, 4.0]])
    >>> y = scaler.apply(scaler.fit(x), x)
    >>> print(co_moments(y).covariance().round(3) + 0.0)
    [[[1. 0.] [0. 1.]]]

    References: Bell & Sejnowski 1997; Kessy, Lewin & Strimmer 2018, section 2.
    """
    _checks.epsilon(epsilon)
    feature_axis: Any = _hashable(axis)  # `fit` raises for several
    fit = bind(
        _fit_covariance, axis=feature_axis, epsilon=epsilon, group_size=group_size
    )
    whiten, colour = (bind(f, axis=feature_axis) for f in (_whiten, _colour))
    return Scaler(fit, whiten, colour)


def _fit_covariance(
    x: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    axis: Any,
    epsilon: float,
    group_size: int | None,
) -> Colouring:
    x = _not_empty(x, axis)
    batch = co_moments(x, axis=axis, group_size=group_size, mask=mask)
    eye = jnp.eye(batch.m2.shape[-1], dtype=batch.m2.dtype)[None]
    covariance = jnp.where(batch.count > 0, batch.covariance(), eye)
    whitening = inverse_sqrt(covariance, epsilon=epsilon)
    root = jnp.matmul(covariance + epsilon * eye, whitening, precision=HIGHEST)
    return Colouring(batch.mean, whitening, root)


def _whiten(state: Colouring, x: ArrayLike, *, axis: Any) -> jax.Array:
    x, mean, spec = _in_groups(state, x, axis)
    return multiply_groups(state.whitening, x - mean, spec)


def _colour(state: Colouring, y: ArrayLike, *, axis: Any) -> jax.Array:
    y, mean, spec = _in_groups(state, y, axis)
    return multiply_groups(state.colouring, y, spec) + mean


def _in_groups(state: Colouring, x: ArrayLike, axis: Any):
    x = require_real("x", x)
    spec = layout_of(x, axis, state.whitening.shape[-1])
    x, (mean,) = _broadcastable(x, axis, mean=state.mean)
    return x, mean, spec


def _affine(axis: Axis):
    """The functions `apply` and `invert` for a Scaling."""
    return bind(_apply, axis=axis), bind(_invert, axis=axis)


def _apply(state: Scaling, x: ArrayLike, *, axis: Axis) -> jax.Array:
    x, (offset, scale, low) = _broadcastable(x, axis, **state._asdict())
    return (x - offset) / scale + low


def _invert(state: Scaling, y: ArrayLike, *, axis: Axis) -> jax.Array:
    y, (offset, scale, low) = _broadcastable(y, axis, **state._asdict())
    return (y - low) * scale + offset


def _hashable(axis: Axis) -> Axis:
    """The axis or axes; several as a tuple, because a list has no hash."""
    return tuple(axis) if isinstance(axis, Iterable) else axis


def _broadcastable(x: ArrayLike, axis: Axis, **vectors: jax.Array):
    """`x`, at least float32, and checked vectors that broadcast against it."""
    x = _checks.require_inexact("x", x)
    axes = _axes.canonical(axis, x.ndim)
    for name, value in vectors.items():
        _checks.feature_shape(
            name, jnp.asarray(value), _axes.sizes(x.shape, axes), axis
        )
    x = x.astype(_dtypes.statistics_dtype(x.dtype))
    return x, [_axes.expand(jnp.asarray(v), axes, x.ndim) for v in vectors.values()]


def _not_empty(x: ArrayLike, axis: Axis) -> jax.Array:
    """`x` as an array; raises unless it has a value for each feature."""
    x = _checks.require_inexact("x", x)
    axes = _axes.complement(_axes.canonical(axis, x.ndim), x.ndim)
    if 0 in (x.shape[a] for a in axes):
        raise ValueError(
            f"x has shape {x.shape}, without a value for its features (axis={axis!r}): "
            "expected at least one to fit to. Fit to the training data."
        )
    return x


def _mask(mask: ArrayLike | None, x: jax.Array) -> jax.Array:
    mask = _checks.mask(mask, x.shape)
    return jnp.ones((1,) * x.ndim, bool) if mask is None else mask


def _divisor(spread: jax.Array, level: jax.Array) -> jax.Array:
    """`spread`, or 1 where it is no more than the rounding of a constant `level`."""
    rounding = 8 * jnp.finfo(spread.dtype).eps * jnp.abs(level)
    return jnp.where(spread <= rounding, jnp.ones_like(spread), spread)
