"""`Moments`: a count, a mean and a summed squared deviation; and their merge."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from bnjax import _axes, _checks, _dtypes


class Moments(NamedTuple):
    """How many values, their mean, and their summed squared deviation, per feature.

    Attributes:
        count: of the values, or the sum of their weights; real, or of an integer dtype
            (see `merge`); shape () where every feature has the same count, else
            (feature,).
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
            is that of a single value: 0. Of values with weights the count is the sum
            of the weights: to multiply all of them by a number leaves the biased
            variance as it is, but not the unbiased one.

        >>> print(Moments(3.0, 4.0, 26.0).variance(ddof=1))
        13.0
        """
        return variance_from_m2(self.m2, self.count, ddof)

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

    Accuracy in float32. Each merge rounds the mean: at |mean|/std = 1e4 by up to 1e-3
    of a standard deviation, so that many merges of small sets lose accuracy; one
    reduction over `axis_name` does not. The count is exact up to 2^24 values. Beyond
    that each merge adds a relative error of up to 6e-8 to the count, 6e-4 after 10,000
    merges, and does not count a set that is smaller than that. Mean and variance are
    not affected. For a count that is exact up to 2^31 use integer counts,
    `batch._replace(count=batch.count.astype(int))`; they stop at the largest integer.

    Args:
        first: Moments.
        *rest: Moments of the same feature shape.

    Returns:
        Moments. Merging with `Moments.empty` changes nothing. The count is an integer
        where both are, else at least float32.

    Raises:
        TypeError: something else than Moments.
        ValueError: Moments of other feature shapes.

    >>> merged = merge(Moments(2.0, 2.0, 2.0), Moments(2.0, 7.0, 8.0))  # {1, 3}, {5, 9}
    >>> print(merged.mean, merged.variance())
    4.5 8.75

    References: Chan, Golub & LeVeque 1979, eq. 2.1.
    """
    _checks.mergeable((first, *rest), Moments)
    return functools.reduce(_merge_two, rest, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    union = Union.of(a.count, b.count)
    d = _inexact(b.mean) - _inexact(a.mean)
    # The weight first: |d|^2 may overflow where one side is empty.
    between = abs_product(d, d * broadcast_count(union.share_a * union.share_b, d))
    mean = union.blend(_inexact(a.mean), _inexact(b.mean))
    return Moments(union.count, mean, union.total(a.m2, b.m2, between))


class Union(NamedTuple):
    """The counts of two disjoint sets, and of their union.

    The count of the union may be rounded. A total is therefore computed as that count
    times the mean per value, so that total / count stays accurate.
    """

    n_a: jax.Array
    n_b: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, n_a: ArrayLike, n_b: ArrayLike) -> "Union":
        a, b = as_count(n_a), as_count(n_b)
        dtype, rank = _dtypes.promote(a, b), max(a.ndim, b.ndim)
        a, b = (_padded(n.astype(dtype), rank) for n in (a, b))
        count = a + b
        if jnp.issubdtype(dtype, jnp.integer):  # begins again below 0, or at 0
            largest = jnp.asarray(jnp.iinfo(dtype).max, dtype)
            count = jnp.where(count < a, largest, count)
        return cls(a, b, count)

    @property
    def share_a(self) -> jax.Array:
        return self.n_a / _divisor(self.count)

    @property
    def share_b(self) -> jax.Array:
        return self.n_b / _divisor(self.count)

    def blend(self, a: jax.Array, b: jax.Array, more: ArrayLike = 0) -> jax.Array:
        """The weighted mean of `a` and `b`, plus `more`.

        It starts from the mean of the larger set. The small terms are added to each
        other first, because rounding could lose each of them alone.
        """
        from_a = a + ((b - a) * broadcast_count(self.share_b, a) + more)
        from_b = b + ((a - b) * broadcast_count(self.share_a, a) + more)
        return _axes.where(_padded(self.n_a >= self.n_b, a.ndim), from_a, from_b)

    def total(self, a: ArrayLike, b: ArrayLike, between: jax.Array) -> jax.Array:
        """The sum over the union, from the sums `a` and `b` over the sets.

        `between` is the part per value that comes from the distance of their means.
        """
        a, b = _inexact(a), _inexact(b)
        mean_a = a / broadcast_count(_divisor(self.n_a), a)
        mean_b = b / broadcast_count(_divisor(self.n_b), b)
        mean = self.blend(mean_a, mean_b, between)
        both = _padded((self.n_a > 0) & (self.n_b > 0), a.ndim)
        return _axes.where(both, mean * broadcast_count(self.count, mean), a + b)


def as_count(value: ArrayLike) -> jax.Array:
    """Converts a count to at least float32 or int32, so that it can be increased."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        if value.dtype.kind in "iu" and (value > np.iinfo(dtype).max).any():
            value = value.astype(float)  # of int64, which JAX would cut to int32
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return value.astype(_dtypes.statistics_dtype(value))
    narrow = value.dtype == bool or jnp.iinfo(value.dtype).bits < 32
    return value.astype(jnp.int32) if narrow else value


def _divisor(count: jax.Array) -> jax.Array:
    """The count, which may be below 1, and 1 for that of an empty set."""
    return count + (count == 0).astype(count.dtype)


def _inexact(value: ArrayLike) -> jax.Array:
    value = jnp.asarray(value)
    integers = not jnp.issubdtype(value.dtype, jnp.inexact)
    return value.astype(float) if integers else value


def broadcast_count(count: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `count` in the rank and dtype of `value`.

    The axes of a count are the leading ones: those that `vmap` adds, then all of the
    feature axes or none.
    """
    return _padded(count, value.ndim).astype(value.dtype)


def _padded(count: jax.Array, rank: int) -> jax.Array:
    return count.reshape(count.shape + (1,) * (rank - count.ndim))


def mean_from_sum(total: jax.Array, count: jax.Array) -> jax.Array:
    """Returns total / count, and 0 for an empty set."""
    return total / broadcast_count(_divisor(count), total)


def variance_from_m2(m2: ArrayLike, count: ArrayLike, ddof: int) -> jax.Array:
    """Returns m2 / (count - ddof), and 0 where count <= ddof."""
    m2, count = jnp.asarray(m2), as_count(count) - ddof
    if ddof:  # else m2 is 0 there already
        m2 = _axes.where(broadcast_count(count, m2) > 0, m2, jnp.zeros((), m2.dtype))
        count = jnp.maximum(count, 0)
    return mean_from_sum(m2, count)


def abs_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns |a||b| where b = t a with a real t >= 0: Re(conj(a) b)."""
    return (jnp.conj(a) * b).real if jnp.iscomplexobj(a) else a * b


def fast_two_sum(base: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum base + step, and its error: exact minus rounded.

    The error is exact if |base| >= |step|. `base` is the number that was subtracted
    from x; if it was computed here, it must have passed `drop_last_bit`.

    References: Dekker 1971 (Fast2Sum).
    """
    rounded = drop_last_bit(step)
    total = base + rounded
    return total, (rounded - (total - base)) + (step - rounded)


def drop_last_bit(value: jax.Array) -> jax.Array:
    """Rounds `value` to one mantissa bit less, so that all uses see the same number.

    XLA may fuse a product or quotient into each sum that uses it, and round only once.
    The number that is subtracted then differs from the number that is added back.
    """
    if jnp.iscomplexobj(value):
        return lax.complex(drop_last_bit(value.real), drop_last_bit(value.imag))
    info = jnp.finfo(value.dtype)
    return lax.reduce_precision(value, info.nexp, info.nmant - 1)
