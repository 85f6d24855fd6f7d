"""The value: a count, a mean and a summed squared deviation, and its merge."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
        return self.m2 / jnp.maximum(self.count - ddof, 1)

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
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    d = b.mean - a.mean
    # The weight first: |d|^2 may overflow where one side is empty.
    between = abs_product(d, d * (a.count * share))
    return Moments(count, a.mean + d * share, a.m2 + b.m2 + between)


def abs_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a||b| for b a real multiple of a: Re(conj(a) b)."""
    return (jnp.conj(a) * b).real if jnp.iscomplexobj(a) else a * b
