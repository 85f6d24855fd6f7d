"""The value: a count, a mean and a summed squared deviation, and its merge."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from bnjax import _dtypes


class Moments(NamedTuple):
    """How many values, their mean, and their summed squared deviation, per feature.

    Attributes:
        count: real; shape () where every feature has the same count, else (feature,).
        mean: (feature,); at least float32, complex for complex values.
        m2: (feature,), real: sum |x - mean|^2. Never negative.

    >>> both = merge(Moments(2.0, 5.5, 4.5), Moments(1.0, 5.0, 0.0))   # {4, 7} and {5}
    >>> print(*(f"{value:.4f}" for value in both))
    3.0000 5.3333 4.6667
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    def variance(self, ddof: int = 0) -> jax.Array:
        """The variance m2 / (count - ddof): biased for ddof=0, unbiased for ddof=1.

        Args:
            ddof: subtracted from the count.

        Returns:
            (feature,), real. Where count <= ddof there is no estimate, and the value
            is that of a single value: 0.

        >>> print(Moments(3.0, 4.0, 26.0).variance(ddof=1))
        13.0
        """
        return mean_of(jnp.asarray(self.m2), jnp.asarray(self.count) - ddof)

    @classmethod
    def empty(cls, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> "Moments":
        """The moments of nothing: the identity of `merge`.

        Args:
            shape: the feature shape.
            dtype: of the mean; count and m2 have its real counterpart.

        >>> Moments.empty((3,)).mean.shape
        (3,)
        """
        real = _dtypes.real(dtype)
        return cls(jnp.zeros((), real), jnp.zeros(shape, dtype), jnp.zeros(shape, real))


def merge(first: Moments, *rest: Moments) -> Moments:
    """The moments of the union of disjoint sets.

        n = n_a + n_b,  mean = mean_a + d n_b/n,  m2 = m2_a + m2_b + |d|^2 n_a n_b/n

    Each merge rounds the mean. At |mean|/std = 1e4 that is up to 1e-3 of a standard
    deviation in float32, and many small sets lose accuracy by it; one reduction over
    `axis_name` does not.

    Args:
        first: Moments.
        *rest: Moments of the same feature shape.

    Returns:
        Moments. Merging with `Moments.empty` changes nothing.

    >>> merged = merge(Moments(2.0, 2.0, 2.0), Moments(2.0, 7.0, 8.0))  # {1, 3}, {5, 9}
    >>> print(merged.mean, merged.variance())
    4.5 8.75

    References: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    return functools.reduce(_merge_two, rest, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    n_a, n_b, mean = map(jnp.asarray, (a.count, b.count, a.mean))
    rank = max(n_a.ndim, n_b.ndim)
    n_a, n_b = _padded(n_a, rank), _padded(n_b, rank)
    count = n_a + n_b
    share = n_b / jnp.maximum(count, 1)
    d = b.mean - mean
    # The weight first: |d|^2 may overflow where one side is empty.
    between = abs_product(d, d * beside(n_a * share, d))
    return Moments(count, mean + d * beside(share, d), a.m2 + b.m2 + between)


def beside(count: jax.Array, value: jax.Array) -> jax.Array:
    """`count` in the rank and dtype of `value`.

    The axes of a count are the leading ones: those that `vmap` adds, then all of the
    feature axes or none.
    """
    return _padded(count, value.ndim).astype(value.dtype)


def _padded(count: jax.Array, rank: int) -> jax.Array:
    return count.reshape(count.shape + (1,) * (rank - count.ndim))


def mean_of(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, where the sum of nothing stays 0."""
    return total / beside(jnp.maximum(count, 1), total)


def abs_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a||b| for b a real multiple of a: Re(conj(a) b)."""
    return (jnp.conj(a) * b).real if jnp.iscomplexobj(a) else a * b


def displaced(base: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """base + step, and what its rounding lost; `base` is coarse."""
    rounded = coarse(step)
    total = base + rounded
    return total, (rounded - (total - base)) + (step - rounded)


def coarse(value: jax.Array) -> jax.Array:
    """`value`, with a bit less: the same number wherever it is used.

    Otherwise XLA fuses the product or quotient that it is into each sum that it is
    used in, and rounds both as one: what is subtracted is not what is added back.
    """
    if jnp.iscomplexobj(value):
        return lax.complex(coarse(value.real), coarse(value.imag))
    info = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - 1)
