"""Measures of activations."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bnjax import _axes, _checks, _dtypes


def percentiles(
    x: ArrayLike, q: ArrayLike, *, axis: int | Sequence[int] = -1
) -> jax.Array:
    """Percentiles of each feature's activations.

    Followed over training, those at 15, 50 and 85 show how a layer's input drifts.

    Args:
        x: (batch, *spatial, feature), floating.
        q: percentages in [0, 100], a scalar or (percentile,).
        axis: the feature axis or axes.

    Returns:
        (percentile, feature), or (feature,) for a scalar q.

    Raises:
        TypeError: x is not floating.

    >>> x = jnp.array([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0]])
    >>> print(percentiles(x, jnp.array([50.0, 100.0])))
    [[ 1. 20.]
     [ 2. 30.]]

    References: Ioffe & Szegedy 2015, section 4.1, figure 1(b, c).
    """
    x = _checks.inexact("x", x)
    axes = _axes.canonical(axis, x.ndim)
    return jnp.percentile(x, jnp.asarray(q), axis=_axes.complement(axes, x.ndim))


def effective_rank(x: ArrayLike, *, axis: int | Sequence[int] = -1) -> jax.Array:
    """How many independent directions the features span.

        exp(-sum_i p_i log p_i),  p_i = lambda_i / sum lambda, of the covariance

    The number of features where they are uncorrelated and of one variance, 1 where all
    are multiples of one, 0 where nothing varies.

    Args:
        x: (batch, *spatial, feature), floating.
        axis: the feature axis or axes; several count as one.

    Returns:
        A scalar, at most the number of features.

    Raises:
        TypeError: x is not floating.

    >>> x = jnp.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> print(effective_rank(x).round(3), effective_rank(x * jnp.array([[1.0, 0.0]])))
    2.0 1.0

    References: Roy & Vetterli 2007, of the covariance matrix.
    """
    x = _checks.inexact("x", x)
    x = x.astype(_dtypes.statistics(x.dtype))
    axes = _axes.canonical(axis, x.ndim)
    rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
    rows = rows.reshape(-1, math.prod(_axes.sizes(x.shape, axes)))
    rows = rows - rows.mean(0, keepdims=True)
    values = jnp.maximum(jnp.linalg.eigvalsh(rows.conj().T @ rows), 0)
    total = values.sum()
    p = values / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.exp(jax.scipy.special.entr(p).sum()), 0)
