"""The value: a count, a mean and the summed products of deviations; and its merge."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from bnjax import _checks
from bnjax.moments import Union, variance_from_m2
from bnjax.whiten._layout import outer


class CoMoments(NamedTuple):
    """How many vectors, their mean, and their summed products of deviations.

    Attributes:
        count: (), the number of vectors.
        mean: (feature,); at least float32.
        m2: (groups, size, size): sum (x - mean)(x - mean)^T within each group of
            adjacent features; groups * size features in all.

    >>> m2 = jnp.array([[[2.0, 4.0], [4.0, 8.0]]])
    >>> pair = CoMoments(2.0, jnp.array([2.0, 1.0]), m2)  # (1, -1) and (3, 3)
    >>> one = CoMoments(1.0, jnp.array([5.0, 1.0]), jnp.zeros((1, 2, 2)))
    >>> print(merge(pair, one).mean, merge(pair, one).m2.round(4))
    [3. 1.] [[[8. 4.] [4. 8.]]]
    """

    count: jax.Array
    mean: jax.Array
    m2: jax.Array

    def covariance(self, ddof: int = 0) -> jax.Array:
        """The covariance m2 / (count - ddof): biased for ddof=0, unbiased for ddof=1.

        Args:
            ddof: subtracted from the count.

        Returns:
            (groups, size, size). Where count <= ddof there is no estimate, and the
            value is that of a single vector: 0.

        >>> m2 = jnp.array([[[8.0, 4.0], [4.0, 8.0]]])
        >>> print(CoMoments(3.0, jnp.zeros(2), m2).covariance(ddof=1))
        [[[4. 2.] [2. 4.]]]
        """
        return variance_from_m2(self.m2, self.count, ddof)

    @classmethod
    def empty(
        cls, groups: int, size: int, dtype: DTypeLike = jnp.float32
    ) -> "CoMoments":
        """The co-moments of nothing: the identity of `merge`.

        Args:
            groups: how many groups of features.
            size: how many features each group has.
            dtype: of all values.

        >>> CoMoments.empty(2, 3).m2.shape
        (2, 3, 3)
        """
        mean = jnp.zeros(groups * size, dtype)
        return cls(jnp.zeros((), dtype), mean, jnp.zeros((groups, size, size), dtype))


def merge(first: CoMoments, *rest: CoMoments) -> CoMoments:
    """The co-moments of the union of disjoint sets.

        n = n_a + n_b,  mean = mean_a + d n_b/n,  m2 = m2_a + m2_b + d d^T n_a n_b/n
        with d = mean_b - mean_a

    Args:
        first: CoMoments.
        *rest: CoMoments of the same groups.

    Returns:
        CoMoments. Merging with `CoMoments.empty` changes nothing. How far counts are
        right: see `bnjax.merge`.

    Raises:
        TypeError: something else than CoMoments.
        ValueError: CoMoments of other groups.

    >>> one = CoMoments(1.0, jnp.array([4.0, 7.0]), jnp.zeros((1, 2, 2)))
    >>> two = CoMoments(1.0, jnp.array([6.0, 1.0]), jnp.zeros((1, 2, 2)))
    >>> print(merge(one, two).m2)
    [[[ 2. -6.] [-6. 18.]]]

    References: Chan, Golub & LeVeque 1979, eq. 2.1, with outer products.
    """
    _checks.mergeable((first, *rest), CoMoments)
    return functools.reduce(_merge_two, rest, first)


def _merge_two(a: CoMoments, b: CoMoments) -> CoMoments:
    union = Union.of(a.count, b.count)
    d = (b.mean - a.mean).reshape(a.m2.shape[:-1])
    # The weight first: d^2 may overflow where one side is empty.
    between = outer(d, d * (union.share_a * union.share_b).astype(d.dtype))
    mean = union.blend(a.mean, b.mean)
    return CoMoments(union.count, mean, union.total(a.m2, b.m2, between))
